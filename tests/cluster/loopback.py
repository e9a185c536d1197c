"""Bring up the loopback interface, the only one of the cluster's network namespace (there is no `ip` in a minimal Debian).

It gets a second address: the resolver finds no name where an interface has nothing but 127.0.0.1.
"""

import fcntl
import socket
import struct

SIOCSIFADDR, SIOCSIFFLAGS, UP, RUNNING = 0x8916, 0x8914, 0x1, 0x40

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", UP | RUNNING))
    address = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("192.0.2.1"))
    fcntl.ioctl(control, SIOCSIFADDR, address)
