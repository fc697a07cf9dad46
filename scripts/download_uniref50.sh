#!/usr/bin/env bash
# Download UniRef50 (13 GB of gzipped FASTA) from UniProt's current release, and check its size and MD5.
#
#   scripts/download_uniref50.sh [FOLDER]      writes FOLDER/uniref50.fasta.gz; the default FOLDER is data
#
# A broken connection is resumed automatically. To resume a stopped download, run the same command again.
# uniref50.fasta.gz.release, next to the file, records the release, and the file's size, MD5 and address. A partial
# download of another release, a wrong size or a wrong MD5 is an error; no file is deleted.
#
# UNIREF_URL sets the address of another folder, such as a mirror. For UniRef90, also set UNIREF_NAME=uniref90.fasta.gz.
# UNIREF_WAIT sets the seconds between attempts (default 5).
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
fail() { echo "error: $*" >&2; exit 1; }
[ $# -le 1 ] || fail "expected at most one folder, got $#: $*"
command -v curl > /dev/null || fail "curl is not installed (apt-get install curl)"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PROTLIG_VENV:-$root/.venv}/bin/python
[ -x "$python" ] || python=python3

url=${UNIREF_URL:-https://ftp.uniprot.org/pub/databases/uniprot/current_release/uniref/uniref50}
name=${UNIREF_NAME:-uniref50.fasta.gz}
folder=${1:-data}
final=$folder/$name part=$folder/$name.part
mkdir -p "$folder"
exec 9< "$folder" # the next line locks the folder, so that a second download into the folder fails
! command -v flock > /dev/null || flock -n 9 || fail "another download into $folder is running"

metalink=$(curl -fsSL --retry 3 "$url/RELEASE.metalink") || fail "cannot read $url/RELEASE.metalink"
release=$("$python" -c '
import sys, xml.etree.ElementTree as tree
try:
    root = tree.fromstring(sys.stdin.read())
    entry = next(file for file in root.iterfind(".//{*}file") if file.get("name") == sys.argv[1])
    md5 = next(hash.text for hash in entry.iterfind(".//{*}hash") if hash.get("type") == "md5")
    values = root.findtext("{*}version"), entry.findtext("{*}size"), md5
    print("release={}\nsize={}\nmd5={}".format(*(value.strip() for value in values)))
except (tree.ParseError, StopIteration, AttributeError):
    sys.exit(1)
' "$name" <<< "$metalink") || fail "$url/RELEASE.metalink gives no version, size and MD5 of $name"
number=$(sed -n 's/^release=//p' <<< "$release")
size=$(sed -n 's/^size=//p' <<< "$release")
md5=$(sed -n 's/^md5=//p' <<< "$release")
release+=$'\n'"url=$url/$name"

same_release() { # fail unless the downloaded file $1 is of the release on the server
    local had
    had=$(cat "$1.release" 2> /dev/null) || fail "$1 exists, but $1.release does not; move $1 aside and start again"
    [ "$(head -n 3 <<< "$had")" = "$(head -n 3 <<< "$release")" ] ||
        fail "$1 is of release $(sed -n 's/^release=//p' <<< "$had"), the server has release $number; move it aside to download release $number"
}
bytes() { [ -e "$1" ] && wc -c < "$1" | tr -d ' ' || echo 0; }

if [ -e "$final" ]; then
    same_release "$final"
    [ "$(bytes "$final")" = "$size" ] || fail "$final has $(bytes "$final") bytes, release $number has $size; move it aside"
    echo "$final exists already: release $number"
    exit 0
fi
if [ -e "$part" ]; then same_release "$part"; fi
echo "$release" > "$part.release"

echo "release $number, $name, $size bytes, $(bytes "$part") of them downloaded already"
show=-sS
[ ! -t 2 ] || show=--progress-bar
failures=0
while have=$(bytes "$part") && [ "$have" -lt "$size" ]; do
    code=0 # a transfer below 1,000 bytes/s for a minute counts as broken
    curl -fL "$show" --connect-timeout 30 --speed-limit 1000 --speed-time 60 -C - -o "$part" "$url/$name" || code=$?
    [ "$code" != 33 ] || fail "$url/$name cannot be resumed at byte $have: the server does not support ranges"
    [ "$code" != 23 ] || fail "$part cannot be written"
    if [ "$(bytes "$part")" -gt "$have" ]; then failures=0; else failures=$((failures + 1)); fi
    [ "$failures" -lt 5 ] || fail "$url/$name sends no data after byte $have (curl's exit code $code); run this again later"
    [ "$code" = 0 ] || sleep "${UNIREF_WAIT:-5}"
done

[ "$have" = "$size" ] || fail "$part has $have bytes, release $number has $size; move it aside and start again"
echo "checking the MD5 of $size bytes"
found=$("$python" -c 'import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], "rb"), "md5").hexdigest())' "$part")
[ "$found" = "$md5" ] || fail "$part has MD5 $found, release $number has $md5; move it aside and start again"
# in this order: if the script is killed between two of these three lines, its next run still accepts the files
cp "$part.release" "$final.release"
mv "$part" "$final"
rm -f "$part.release"
echo "$final: release $number"
echo "next: python -m protlig_dd.prepare input=$final output=data/uniref50.h5"
