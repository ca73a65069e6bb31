"""The peer's side of the benchmark: GPT-2 of `transformers` on PyTorch, as its users would train it.

On a CPU float32, fused AdamW and scaled-dot-product attention; on a GPU bfloat16 autocast, float32
parameters and cuDNN's attention first. `bench` starts this as a process: it needs only torch and
transformers.
"""

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from tools import bench_pipe

KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Peer:
    """GPT-2 of one shape, trained or decoded in each of several modes."""

    def prepare(self, *, shape: dict, optim: dict, decode: bool, device: str) -> dict:
        """Make the model, and return what it is and its modes."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
        torch.manual_seed(0)
        self.device, self.shape, self.optim = device, shape, optim
        config = GPT2Config(
            vocab_size=shape["vocab_size"],
            n_positions=shape["length"],
            n_embd=shape["model_dim"],
            n_layer=shape["num_layers"],
            n_head=shape["num_heads"],
            n_inner=shape["mlp_dim"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        config._attn_implementation = "sdpa"
        self.model: Any = GPT2LMHeadModel(config).to(torch.device(device))
        if decode:
            self.model = self.model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()
            self.modes: dict[str, Callable] = {
                "dynamic cache": self._decode,
                "static cache": self._decode_static,
            }
        else:
            self.model.train()
            self.adamw = torch.optim.AdamW(
                self.model.parameters(),
                lr=optim["peak_lr"],
                betas=(optim["beta1"], optim["beta2"]),
                weight_decay=optim["weight_decay"],
                fused=True,
            )
            compiled = torch.compile(self.model)
            self.modes = {
                "eager": lambda steps: self._train(self.model, steps),
                "torch.compile": lambda steps: self._train(compiled, steps),
            }
        rows, length = shape["rows"], shape["length"]
        self.batches = [
            torch.randint(shape["vocab_size"], (rows, length), device=device) for _ in range(4)
        ]
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"parameters": parameters, "modes": list(self.modes), "torch": torch.__version__}

    def run(self, *, mode: str, steps: int) -> float:
        """Return the seconds that `steps` updates, or new tokens, take."""
        self._wait()
        start = time.perf_counter()
        self.modes[mode](steps)
        self._wait()
        return time.perf_counter() - start

    def peak_bytes(self) -> int:
        """Return the most memory in use so far: the device's, or the process's on a CPU."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        if self.device != "cuda":
            yield
            return
        with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(KERNELS, set_priority=True):
            yield

    def _train(self, model: Callable, steps: int) -> None:
        parts = self.shape["accumulate_steps"]
        for step in range(steps):
            for tokens in self.batches[step % len(self.batches)].chunk(parts):
                with self._precision():
                    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                (loss / parts).backward()
            if self.optim["clip_norm"]:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim["clip_norm"])
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)

    def _decode(self, steps: int, **options: str) -> None:
        prompt = self.batches[0][: self.shape["rows"], : self.shape["prompt"]]
        made = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            **options,
        )
        assert made.shape[1] == prompt.shape[1] + steps

    def _decode_static(self, steps: int) -> None:
        self._decode(steps, cache_implementation="static")


if __name__ == "__main__":
    bench_pipe.serve(Peer())
