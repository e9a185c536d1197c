"""The memory that is announced is the memory that is used: formulas against peaks of a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PEAKS = """
import contextlib, json, os, sys
from pathlib import Path
import numpy as np, torch, transformers
import tiny
from kvpipe.cache.capture import Recorder
from kvpipe.cache.store import StoreKey, build_shard
from kvpipe.config import StoreConfig
from kvpipe.data.encoding import Encoding
from kvpipe.evaluate.generate import Drawn, Sampling
from kvpipe.experiment.attempts import Attempt
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.sizes import scoring_bytes, shape, teacher_pass_bytes, training_bytes, writing_bytes
from kvpipe.models.likelihood import score, scoring_batches
from kvpipe.steps.train import load_cell, prepare
from kvpipe.train.trainer import Loop, peak_memory

STUDENT = {
    "model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 512}
TEACHER = transformers.LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
                                   num_attention_heads=8, num_key_value_heads=8)
COUNT, LENGTH = 25, 100

def peak():
    return peak_memory(torch.device("cpu"))

def began():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()

def training(arm):
    work = tiny.build(folder / arm, {"models.student.architecture": STUDENT, "train.batch_size": 28, "train.device": "cpu",
                                     "train.log_every": 9, "train.eval_every": 9, "train.steps": 9})
    prepare(work, arm, log=lambda *_: None)
    base = began()
    cell = load_cell(work, arm, 0, log=lambda *_: None)
    loop = Loop(cell, folder / "unused", Attempt(folder / "unused", "cpu", 1))
    records = loop.objective.records
    with Recorder(cell.student, queries=False) if records else contextlib.nullcontext() as recorder:
        loop._step(0, recorder), loop._step(1, recorder)
    found = shape(cell.student.config.to_dict(), parameters=cell.student.num_parameters())
    tokens = loop.counters.padded_tokens // 2
    return peak() - base, training_bytes(found, cell.config, tokens, 10 if records else 0)

def reading(store):
    base, count = began(), COUNT
    model = transformers.AutoModelForCausalLM.from_config(TEACHER).eval()
    encoding = Encoding(
        ids=np.random.default_rng(0).integers(3, 32000, count * LENGTH), spans=np.zeros((count * LENGTH, 2), np.int64),
        offsets=np.arange(count + 1) * LENGTH, segments=np.zeros((count, 3, 2), np.int64),
        byte_segments=np.zeros((count, 3, 2), np.int64), segment_hashes=np.zeros((count, 3), np.int64))
    found = shape(TEACHER.to_dict(), parameters=model.num_parameters())
    if not store:
        score(model, encoding, scoring_batches(encoding, 0, count))
        return peak() - base, scoring_bytes(found, count * LENGTH, cached=False)
    key = StoreKey("m", "d", (0, 1, 2, 3), "student", "bf16", 8, 1, True)
    build_shard(model, encoding, key, StoreConfig(top_logits=8), 0, folder / "shard.safetensors", 0)
    return peak() - base, teacher_pass_bytes(found, 4, LENGTH)

def writing(rows):
    base, prompt, new = began(), 60, 40
    model = transformers.AutoModelForCausalLM.from_config(TEACHER).eval()
    ids, drawn = torch.randint(3, 32000, (rows, prompt)), Sampling(0.7, 0.95, range(rows))
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                       pad_token_id=0, eos_token_id=None, logits_processor=[Drawn(drawn, range(rows), new, prompt)])
    found = shape(TEACHER.to_dict(), parameters=model.num_parameters())
    return peak() - base, writing_bytes(found, rows * (prompt + new), rows)

def alone(name, measure, argument):
    # a fresh heap: what another measurement has freed would be taken again unseen
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.write(write, json.dumps(measure(argument)).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(read, 1000))

torch.set_num_threads(1)
resolve_device("cpu")
folder = Path(sys.argv[1])
asked = {"control": (training, "control"), "keys and values": (training, "one"), "teacher pass": (reading, True),
         "scoring": (reading, False), "texts": (writing, 24)}
print(json.dumps({name: alone(name, *what) for name, what in asked.items()}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a part of a process: Linux alone")
def test_announced_memory_is_within_a_quarter_of_what_is_used(tmp_path):
    command = [sys.executable, "-c", PEAKS, str(tmp_path)]
    paths = ":".join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for what, (used, announced) in found.items():
        assert used == pytest.approx(announced, rel=0.25), (what, found)
