"""`kvpipe.cache.capture`, under the name that others rely on."""

from kvpipe.cache.capture import capture as capture
