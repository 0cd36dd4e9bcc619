"""A model whose heads are split over two processes generates what it generates in one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="tp_plan needs accelerate")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

PROGRAM = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM
from kvq_compile import QuantizedKV
from kvq_compile.history import watching

torch.set_num_threads(1)
folder, plan = sys.argv[1:]
options = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
model = AutoModelForCausalLM.from_pretrained(folder, **({"tp_plan": plan} if plan else {})).eval()
model.compile(backend="kvq", options=options)
prompt = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(0))
about = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
about |= {"return_dict_in_generate": True, "output_logits": True}
with watching() as graphs:
    result = model.generate(prompt, attention_mask=torch.ones_like(prompt), **about)
keys = result.past_key_values.layers[0].keys
rank = os.environ.get("RANK", "0")
told = {
    "tokens": result.sequences,
    "logits": torch.stack(result.logits),
    "outcomes": sorted({site.outcome for graph in graphs for site in graph.sites}),
    "graphs": len(graphs),
    "heads": keys.shape[1] if isinstance(keys, QuantizedKV) else None,
}
torch.save(told, f"{folder}/{plan}{rank}.pt")
if plan:
    torch.distributed.destroy_process_group()
"""


def run(folder: Path, plan: str, count: int) -> None:
    """Run the program in so many processes, as torchrun starts them."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(folder), plan]
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    told = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n".join(told)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_generate_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    """Each of them packs the keys and values of its own heads; sums over heads are off by their rounding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), ""])
    exec(PROGRAM, {})
    run(tmp_path, "auto", 2)
    one, *two = (torch.load(tmp_path / name) for name in ("0.pt", "auto0.pt", "auto1.pt"))
    assert one["heads"] == 2
    for told in two:
        assert told["heads"] == 1
        assert told["outcomes"] == one["outcomes"] == ["rewritten"]
        assert told["graphs"] == one["graphs"] == 2
        assert torch.equal(told["tokens"], one["tokens"])
        torch.testing.assert_close(told["logits"], one["logits"], rtol=0, atol=1e-4)
