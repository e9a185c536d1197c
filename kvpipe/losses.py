"""`kvpipe.distill.losses`, under the name that others rely on."""

from kvpipe.distill.losses import kv_loss as kv_loss
