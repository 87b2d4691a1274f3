#!/bin/sh
# Fashion-MNIST for the vision recipe: Debian's package dataset-fashion-mnist, without root where there is none.
#   sh pictures.sh FOLDER
set -e
installed=/usr/share/datasets/fashion-mnist
package=dataset-fashion-mnist
folder=$1/fashion-mnist
if [ -f "$installed/train-images-idx3-ubyte.gz" ] || [ -f "$folder/train-images-idx3-ubyte.gz" ]; then exit 0; fi
command -v apt-get >/dev/null || { echo "$package is a Debian package, and there is no apt-get here; put its files into $folder"; exit 1; }
if [ "$(id -u)" = 0 ]; then
    apt-get install -qq --yes $package >/dev/null 2>&1 || { apt-get update -qq; apt-get install -qq --yes $package >/dev/null; }
    [ -f "$installed/train-images-idx3-ubyte.gz" ] || { echo "next: sudo apt-get install $package"; exit 1; }
    exit 0
fi
temporary=$(mktemp -d)
(cd "$temporary" && apt-get download -qq $package && dpkg-deb -x $package*.deb .) ||
    { rm -rf "$temporary"; echo "next: sudo apt-get install $package"; exit 1; }
mkdir -p "$1"
mv "$temporary$installed" "$folder"
rm -rf "$temporary"
