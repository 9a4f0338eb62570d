#!/usr/bin/env bash
# Translates raw text, line by line, with a model that has been trained here: see --help.
exec "${PYTHON:-python}" "$(dirname "$0")/translate.py" "$@"
