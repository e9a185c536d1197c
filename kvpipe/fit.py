"""`kvpipe.distill.fit`, under the name that others rely on."""

from kvpipe.distill.fit import ridge as ridge
