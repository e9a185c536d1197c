#!/bin/bash
# The first process of the cluster. Runs in namespaces of its own (mounts, processes, network, host name), so
# that nothing of it is left once this process ends: the kernel kills what it started and forgets what it mounted.
# It ends when its standard input does, that is with the test run, however that ends.
#
# usage: init.sh CACHE HOME NODE…    (HOME becomes the home of the ordinary user, ann)
set -euo pipefail

cache=$1
home=$2
root=$cache/root

if [[ $3 != inside ]]; then
    hostname localhost
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    # device nodes of its own: Apptainer's FUSE mounts need a /dev/fuse that an ordinary user may open
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    mkdir -p "$root/dev/pts" "$root/dev/shm"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
    for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 fuse:10:229; do
        IFS=: read -r name major minor <<< "$node"
        mknod -m 666 "$root/dev/$name" c "$major" "$minor"
    done
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    mount -t tmpfs -o mode=1777,size=1g tmpfs "$root/tmp"
    mount -t tmpfs -o mode=755,size=256m tmpfs "$root/run"
    mount --bind "$cache" "$root/cache"
    mount --bind "$home" "$root/home/ann"
    cp -r "$(dirname "$0")"/{init.sh,loopback.py,slurm} "$root/run/"
    cd "$root"
    # Apptainer refuses a plain chroot
    pivot_root . old
    exec chroot . /bin/bash /run/init.sh /cache /home/ann inside "${@:3}"
fi

umount -l /old
cd /
python3 /run/loopback.py
mkdir -p /run/munge /run/log /run/slurmctld
chown munge: /run/munge
setpriv --reuid munge --regid munge --clear-groups munged --pid-file /run/munge/munged.pid \
    --log-file /run/munge/munged.log --seed-file /run/munge/munged.seed
nodes=("${@:4}")
for ((number = 0; number < ${#nodes[@]}; number++)); do
    echo "NodeName=${nodes[number]} NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((6820 + number)) CPUs=2" \
        "RealMemory=20000 Gres=gpu:$((2 / ${#nodes[@]})) State=UNKNOWN"
done > /run/slurm/nodes.conf
slurmctld
for node in "${nodes[@]}"; do
    slurmd -N "$node"
done
for ((wait = 0; wait < 60; wait++)); do
    [[ $(timeout 5 sinfo --noheader --format %t 2> /dev/null | sort -u) == idle ]] && break
    sleep 1
done
if ((wait == 60)); then
    echo "the nodes did not become idle within 60 s:" >&2
    sinfo >&2 || true
    tail -n 20 /run/log/*.log >&2
    exit 1
fi
echo ready
# as the first process it also takes over and reaps what others leave behind
while read -r _; do :; done
