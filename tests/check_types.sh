#!/bin/sh
# The wheel, unpacked by itself, as users get it: its data is there, and mypy finds nothing.
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
PYTHONPATH="$work/site" "$bin/python" -c "
import edgetune.report, pathlib
from edgetune.recipe import recipe
from edgetune.profile import device
here = pathlib.Path(edgetune.__file__).parent
assert here.is_relative_to('$work'), here
assert recipe.load('text-minilm') and device.load('pixel-8') and (here / 'report' / 'templates' / 'report.html').is_file()
"
MYPYPATH="$work/site" "$bin/mypy" --config-file "$root/pyproject.toml" -p edgetune
