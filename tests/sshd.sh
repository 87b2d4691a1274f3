#!/bin/sh
# OpenSSH's server for tests/test_ssh.py: Debian's package, unpacked without root where there is none. Without it those
# tests are skipped, and say so.
#   sh sshd.sh FOLDER
set -e
next='next: sudo apt-get install openssh-server'
folder=$1/sshd
if command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] || [ -x "$folder/usr/sbin/sshd" ]; then exit 0; fi
command -v apt-get >/dev/null || { echo "sshd is not here, and there is no apt-get; the tests over ssh are skipped"; exit 0; }
if [ "$(id -u)" = 0 ]; then # sshd as root wants a user of its own, which only an installation makes
    # where services are run, an installation would start one that listens to everybody
    if [ -d /run/systemd/system ]; then echo "the tests over ssh are skipped; $next"; exit 0; fi
    export RUNLEVEL=1 # and elsewhere too, if Debian's scripts thought so
    { apt-get install -qq --yes --no-install-recommends openssh-server >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -qq --yes --no-install-recommends openssh-server >/dev/null; }; } ||
        echo "the tests over ssh are skipped; $next"
    exit 0
fi
temporary=$(mktemp -d)
mkdir -p "$1"
(cd "$temporary" && apt-get download -qq openssh-server libwrap0 && for package in *.deb; do dpkg-deb -x "$package" .; done) &&
    mv "$temporary" "$folder" || { rm -rf "$temporary"; echo "the tests over ssh are skipped; $next"; }
