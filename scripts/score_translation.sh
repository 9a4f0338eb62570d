#!/usr/bin/env bash
# Translates a test set with beam search, and prints detokenised SacreBLEU with its signature: see --help.
exec "${PYTHON:-python}" "$(dirname "$0")/score_translation.py" "$@"
