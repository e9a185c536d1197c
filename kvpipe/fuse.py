"""`kvpipe.distill.fusion`, under the name that others rely on."""

from kvpipe.distill.fusion import AttentionFusion as AttentionFusion
from kvpipe.distill.fusion import LearnableFusion as LearnableFusion
from kvpipe.distill.fusion import MeanFusion as MeanFusion
from kvpipe.distill.fusion import SelectFusion as SelectFusion
from kvpipe.distill.fusion import TaskFusion as TaskFusion
