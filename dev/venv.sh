#!/usr/bin/env bash
# Creates a virtual environment: dev/venv.sh PYTHON FOLDER. One that a set-up has left unfinished is kept, unless another version of
# Python made it: what pip could not install there it could not install now either.
set -euo pipefail
python=$1 folder=$2

version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo none; }

if [ ! -x "$folder/bin/python" ]; then
    echo "set-up: creating $folder with Python $(version "$python")"
    "$python" -m venv "$folder"
elif [ ! -e "$folder/.ready" ] && [ "$(version "$folder/bin/python")" != "$(version "$python")" ]; then
    echo "set-up: creating $folder anew with Python $(version "$python"): it was unfinished, and of Python $(version "$folder/bin/python")"
    "$python" -m venv --clear "$folder"
fi
