#!/bin/sh
# mypy on what is shipped: the wheel, unpacked by itself, so that edgetune.export and the others are where users find them.
#   sh check_types.sh BIN      BIN: the bin folder of an environment with mypy
set -e
bin=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$root/build"
"$bin/python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$work" "$root"
"$bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$work/site" "$work"/*.whl
cd "$work"
MYPYPATH="$work/site" "$bin/mypy" --config-file "$root/pyproject.toml" -p edgetune
