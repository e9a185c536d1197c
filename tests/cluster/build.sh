#!/usr/bin/env bash
# Build once what `make test-cluster` needs, into a cache folder outside the checkout; as root, with a network:
#
#   root/        a Debian with Slurm, Apptainer and an ordinary user, ann
#   login/       Python packages of the login side, for the Python of root/
#   base/        the base of the image: a Debian whose Python is that of the wheels
#   wheelhouse/  the wheels
#
# usage: build.sh CACHE PYTHON    (the Python whose pip fetches wheels and whose version the base has: 3.11)
#
# What is complete is kept; remove a folder to build it again. Exit status 69 where Debian's packages cannot be fetched.
set -euo pipefail

UNAVAILABLE=69

cache=$1
python=$2
checkout=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$cache"
cd "$cache"

# packages belong to a lock, Debian's folders do not
content() {
    case $1 in
        login) cat "$checkout/requirements.lock" "$checkout/containers/login.txt" | sha256sum ;;
        wheelhouse) sha256sum < "$checkout/containers/image.lock" ;;
        *) echo complete ;;
    esac
}
done_with() { content "$1" > "$1.complete"; }
is_done() { [[ -e $1.complete && $(cat "$1.complete") == "$(content "$1")" ]]; }
begin() {
    echo "== building $1"
    rm -rf --one-file-system "$1"
}

build_root() {
    begin root
    debootstrap --variant=minbase \
        --include=ca-certificates,make,python3,python3-venv,slurmctld,slurmd,slurm-client,munge,squashfs-tools,uidmap \
        trixie root || exit $UNAVAILABLE
    # Apptainer is in no release: it comes from unstable, pinned low so that nothing else does
    sed s/trixie/sid/ root/etc/apt/sources.list > root/etc/apt/sources.list.d/sid.list
    printf 'Package: *\nPin: release n=sid\nPin-Priority: 100\n' > root/etc/apt/preferences.d/sid
    # a mirror may lag behind unstable's two weeks of validity
    chroot root apt-get -o Acquire::Check-Valid-Until=false update || exit $UNAVAILABLE
    DEBIAN_FRONTEND=noninteractive chroot root apt-get install -y --no-install-recommends apptainer squashfuse fuse2fs
    configure_root
    done_with root
}

configure_root() {
    chroot root useradd --create-home --uid 1000 --shell /bin/bash ann
    rm -f root/etc/munge/munge.key
    chroot root mungekey --create
    chroot root chown munge: /etc/munge/munge.key
    mkdir -p root/old root/cache root/opt/fakegpu root/etc/slurm
    for file in slurm gres cgroup; do
        ln -sfn "/run/slurm/$file.conf" "root/etc/slurm/$file.conf"
    done
    ln -sf /dev/null root/opt/fakegpu/gpu0
    ln -sf /dev/null root/opt/fakegpu/gpu1
}

build_login() {
    begin login
    local version
    version=$(chroot root python3 -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
    # some packages come as source only: the wheelhouse has them built
    "$python" -m pip install --quiet --target "$cache/login" --only-binary=:all: --python-version "$version" \
        --find-links "$cache/wheelhouse" --constraint "$checkout/requirements.lock" --requirement "$checkout/containers/login.txt"
    # compiled by the Python that will run it, since every job starts it several times; a few files are for other versions
    unshare --mount bash -c 'mount --bind login root/mnt && { chroot root python3 -m compileall -q /mnt > /dev/null || true; }'
    done_with login
}

build_base() {
    begin base
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm base || exit $UNAVAILABLE
    rm -rf base/var/cache/apt/archives/*.deb
    # an ordinary user can neither read nor make device nodes
    find base/dev base/proc base/sys -mindepth 1 -delete
    chown -R 1000:1000 base
    done_with base
}

build_wheelhouse() {
    begin wheelhouse
    VARIANT=cpu WHEELHOUSE="$cache/wheelhouse" PYTHON="$python" "$checkout/containers/image.sh" wheelhouse
    chmod -R a+rX wheelhouse
    done_with wheelhouse
}

is_done root || build_root
is_done base || build_base
is_done wheelhouse || build_wheelhouse
is_done login || build_login
