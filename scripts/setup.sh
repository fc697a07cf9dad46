#!/usr/bin/env bash
# Set up .venv with the pinned dependencies. A second run does nothing unless the dependencies have changed.
#
#   scripts/setup.sh            install what training and sampling need
#   scripts/setup.sh --dev      also install what the tests need, and transformers 4 in .venv-transformers4
#   scripts/setup.sh --system   also install (as root, on Debian) the system programs that some tests use
#
# PROTLIG_VENV sets another folder for the environment, PYTHON another interpreter (3.11 or newer).
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${PROTLIG_VENV:-.venv}
extras=""
system=no
for argument in "$@"; do
    case "$argument" in
        --dev) extras="[dev,esm,hmm,hub,slurm,wandb]" ;;
        --system) system=yes ;;
        *) echo "error: unknown argument $argument; see scripts/setup.sh --help" >&2; exit 1 ;;
    esac
done

if [ "$system" = yes ]; then
    if ! command -v mmseqs > /dev/null || ! command -v curl > /dev/null || ! command -v slurmd > /dev/null ||
        ! command -v g++ > /dev/null || ! command -v ip > /dev/null || ! command -v chromium > /dev/null; then
        if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
            echo "error: --system needs root and apt-get; without them, install mmseqs2, curl, g++, iproute2, chromium and Slurm yourself" >&2
            exit 1
        fi
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq mmseqs2 curl g++ iproute2 chromium munge slurmctld slurmd slurm-client
    fi
fi

# Install transformers 4 in a folder of its own, without the packages that $venv already has. A test puts this folder in
# front of the others on Python's path. If the packages cannot be downloaded, the test is skipped.
install_transformers4() {
    local folder="$venv-transformers4" want
    want=$(cksum < constraints-transformers4.txt)
    if [ "$(cat "$folder/.protlig_setup" 2> /dev/null)" = "$want" ]; then
        return
    fi
    rm -rf "$folder"
    mkdir -p "$folder"
    if "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 --no-compile --no-deps \
        --target "$folder" -r constraints-transformers4.txt; then
        echo "$want" > "$folder/.protlig_setup"
    else
        rm -rf "$folder"
        echo "transformers 4 cannot be installed; the test of exported models with it will be skipped" >&2
    fi
}

stamp="$venv/.protlig_setup"
want=$(cat pyproject.toml constraints.txt | cksum; pwd)
have=$(cat "$stamp" 2> /dev/null || true)
if [ -x "$venv/bin/python" ] && { [ "$have" = "$want [dev,esm,hmm,hub,slurm,wandb]" ] || [ "$have" = "$want $extras" ]; }; then
    [ -z "$extras" ] || install_transformers4
    exit 0
fi

python=""
for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11 or newer found; set PYTHON to the path of such an interpreter" >&2
    exit 1
fi
echo "setting up $venv with $("$python" --version) (the first time takes a few minutes)"
if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    "$python" -m venv --clear "$venv" # also replaces an incomplete environment
fi
compile=--compile
if [ -n "$extras" ] && [ -z "${PYTHONDONTWRITEBYTECODE:-}" ]; then
    compile=--no-compile # compiling takes a third of the installation time, and the tests import only some modules
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check $compile -c constraints.txt -e ".$extras"
if [ $compile = --no-compile ]; then # compile five packages now, or each test process would compile their modules
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$venv/bin/python" -m compileall -qq -j 0 -x 'packages/.*/tests?/' \
        "$site"/{torch,sympy,scipy,numpy,matplotlib} || true # one file of torch does not compile without a newer Python
fi
echo "$want $extras" > "$stamp"
[ -z "$extras" ] || install_transformers4
