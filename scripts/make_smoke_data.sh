#!/usr/bin/env bash
# Makes small artificial data in the files that prepare_*.sh expect, so that whole recipes run in minutes.
#
#     bash scripts/make_smoke_data.sh FOLDER [PAIRS]      # of sentences for training (default: 2000)
#
# makes FOLDER/multi30k                  for prepare_multi30k.sh --from
#       FOLDER/de-en.tgz                 for prepare_iwslt14.sh --archive
#       FOLDER/wikitext-103-v1.zip       for prepare_wikitext103.sh --archive
#
# Names, folders and markup are those of the published data, the sentences those of make_demo_corpus.py.

set -euo pipefail
[[ ${1:--} != -* ]] || { sed -n '2,/^$/s/^# \?//p' "$0" >&2; exit 1; }
out=$1 python=${PYTHON:-python}
part=$out/part
rm -rf "$part"
mkdir -p "$part"/{multi30k,de-en,wiki,raw}
"$python" "$(dirname "$0")/make_demo_corpus.py" --out "$part/text" --train "${2:-2000}" --valid 100 --test 100

for language in de en; do
    text=$part/raw talks=$part/de-en
    for split in train valid test; do # in normal spelling: a capital first, no blank before punctuation
        sed 's/^./\u&/; s/ \([.,?]\)/\1/g' "$part/text/$split.$language" >"$text/$split.$language"
    done
    cp "$text/train.$language" "$part/multi30k/train.$language"
    cp "$text/valid.$language" "$part/multi30k/val.$language"
    cp "$text/test.$language" "$part/multi30k/test_2016_flickr.$language"
    { printf '<url>http://www.ted.com/talks/1</url>\n<title>Attention</title>\n'; cat "$text/train.$language"; } \
        >"$talks/train.tags.de-en.$language"
    for set in TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012; do
        head -n 40 "$text/test.$language" | sed 's|.*|<seg id="1"> & </seg>|' >"$talks/IWSLT14.$set.de-en.$language.xml"
    done
done
for split in train valid test; do
    sed 's/.*/ & /' "$part/text/$split.en" >"$part/wiki/wiki.$split.tokens"
done
tar -czf "$part/de-en.tgz" -C "$part" de-en
(cd "$part/wiki" && "$python" -m zipfile -c ../wikitext-103-v1.zip wiki.*.tokens)
rm -rf "${out:?}/multi30k"
mv "$part"/{multi30k,de-en.tgz,wikitext-103-v1.zip} "$out"
rm -r "$part"
