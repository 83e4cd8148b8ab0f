#!/bin/sh
# usage: torch-cpu.sh PYTHON LOCK
# Installs the CPU build of torch that LOCK names. PyPI does not have it: pip gets it where an
# index or folder with it is configured, else uv, which knows PyTorch's CPU index.
set -eu
python=$1
torch=$(sed -n 's/^\(torch==[^ ]*+cpu\).*/\1/p' "$2")

"$python" -m pip install --disable-pip-version-check --no-deps "$torch" && exit
echo "pip finds no $torch; uv will look in PyTorch's CPU index."
"$python" -m pip install --quiet --disable-pip-version-check uv &&
    "$python" -m uv pip install --python "$python" --no-deps --torch-backend=cpu "$torch" && exit
echo "No $torch, neither from pip nor from PyTorch: set PIP_EXTRA_INDEX_URL to the CPU wheel index named on pytorch.org/get-started, then run make again." >&2
exit 1
