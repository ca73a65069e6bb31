"""The peer's side of the benchmark: models on PyTorch, as their users train them; `transformers` has most.

On a CPU float32, fused AdamW and scaled-dot-product attention; on a GPU bfloat16 autocast, float32
parameters and cuDNN's attention first. `bench` starts this as a process: it needs only torch, and
transformers for what is not recurrent. To add a model, write a `Family` and name it in `FAMILIES`.
"""

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools import bench_pipe

KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
NUM_BATCHES = 4
UNSCORED = -100  # label of a position without a loss
Shape = dict[str, Any]
Batch = dict[str, torch.Tensor]


class Family(NamedTuple):
    """A model, its random batches, and its loss by (callable model, batch)."""

    model: Callable[[Shape], Any]
    batch: Callable[[Shape], Batch]
    loss: Callable[[Any, Batch], torch.Tensor]


def _tokens(shape: Shape, length: int) -> torch.Tensor:
    return torch.randint(shape["vocab_size"], (shape["rows"], length))


def _loss_of_transformers(model: Any, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def _gpt2(shape: Shape) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["length"],
        n_embd=shape["model_dim"],
        n_layer=shape["num_layers"],
        n_head=shape["num_heads"],
        n_inner=shape["mlp_dim"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,  # in training; generation asks for one
    )
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def _gpt2_batch(shape: Shape) -> Batch:
    tokens = _tokens(shape, shape["length"])
    return {"input_ids": tokens, "labels": tokens}


def _bert(shape: Shape) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["model_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        intermediate_size=shape["mlp_dim"],
        hidden_act={"gelu_erf": "gelu", "gelu": "gelu_new", "relu": "relu"}[shape["activation"]],
        hidden_dropout_prob=shape["dropout"],
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=shape["length"],
        type_vocab_size=max(1, shape["num_types"]),
    )
    config._attn_implementation = "sdpa"
    return BertForMaskedLM(config)


def _bert_batch(shape: Shape) -> Batch:
    tokens = _tokens(shape, shape["length"])
    order = torch.rand(tokens.shape).argsort(dim=1)  # as many positions of each row as ours score
    return {"input_ids": tokens, "labels": tokens.where(order < shape["max_scored"], UNSCORED)}


def _t5(shape: Shape) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=shape["vocab_size"],
        d_model=shape["model_dim"],
        d_kv=shape["head_dim"],
        d_ff=shape["mlp_dim"],
        num_layers=shape["num_layers"],
        num_decoder_layers=shape["num_decoder_layers"],
        num_heads=shape["num_heads"],
        dropout_rate=shape["dropout"],
        feed_forward_proj={"relu": "relu", "geglu": "gated-gelu"}[shape["activation"]],
        tie_word_embeddings=shape["tied"],
        decoder_start_token_id=0,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


def _t5_batch(shape: Shape) -> Batch:
    return {
        "input_ids": _tokens(shape, shape["source_length"]),
        "labels": _tokens(shape, shape["length"]),
    }


class Recurrent(torch.nn.Module):
    """A language model of `torch.nn.LSTM`, `GRU` or `RNN`; the state goes on where it is `stateful`."""

    def __init__(self, shape: Shape):
        super().__init__()
        width, size = shape["model_dim"], shape["vocab_size"]
        self.embed = torch.nn.Embedding(size, width)
        torch.nn.init.normal_(self.embed.weight, std=width**-0.5)
        cell = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[shape["cell"]]
        between = shape["dropout"] if shape["num_layers"] > 1 else 0.0
        self.cell = cell(width, width, shape["num_layers"], batch_first=True, dropout=between)
        self.dropout = torch.nn.Dropout(shape["dropout"])
        self.head = torch.nn.Linear(width, size, bias=False)
        if shape["tied"]:
            self.head.weight = self.embed.weight
        self.stateful = shape["stateful"]
        self.state: Any = None

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss."""
        y, state = self.cell(self.dropout(self.embed(inputs)), self.state)
        if self.stateful:
            both = isinstance(state, tuple)
            self.state = tuple(s.detach() for s in state) if both else state.detach()
        logits = self.head(self.dropout(y))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _recurrent_batch(shape: Shape) -> Batch:
    tokens = _tokens(shape, shape["length"] + 1)
    return {"inputs": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


FAMILIES = {
    "gpt": Family(_gpt2, _gpt2_batch, _loss_of_transformers),
    "bert": Family(_bert, _bert_batch, _loss_of_transformers),
    "t5": Family(_t5, _t5_batch, _loss_of_transformers),
    "rnn": Family(Recurrent, _recurrent_batch, lambda model, batch: model(**batch)),
}


class Peer:
    """A model of one shape, trained or decoded in each of several modes."""

    def prepare(self, *, shape: Shape, optim: dict, decode: bool, device: str) -> dict:
        """Make the model, and return what it is and its modes."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
        torch.manual_seed(0)
        world = int(os.environ.get("JAX_NUM_PROCESSES", 1))
        shape = {**shape, "rows": shape["rows"] // world}
        self.device, self.shape, self.optim = device, shape, optim
        self.family = FAMILIES[shape["family"]]
        self.model = self.family.model(shape).to(torch.device(device))
        if decode:
            self.model = self.model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()
            self.modes: dict[str, Callable] = {
                "dynamic cache": self._decode,
                "static cache": self._decode_static,
            }
        else:
            self.model.train()
            self.trained = self.model if world == 1 else self._joined(world)
            self.adamw = torch.optim.AdamW(
                self.model.parameters(),
                lr=optim["peak_lr"],
                betas=(optim["beta1"], optim["beta2"]),
                weight_decay=optim["weight_decay"],
                fused=True,
            )
            compiled = torch.compile(self.trained)
            self.modes = {
                "eager": lambda steps: self._train(self.trained, steps),
                "torch.compile": lambda steps: self._train(compiled, steps),
            }
        batches = [self.family.batch(shape) for _ in range(NUM_BATCHES)]
        self.batches = [{name: x.to(device) for name, x in batch.items()} for batch in batches]
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        library = f"torch {torch.__version__}"
        return {"parameters": parameters, "modes": list(self.modes), "library": library}

    def _joined(self, world: int) -> Any:
        """Return the model as one of several processes trains it: `BENCH_MEET` is a file where they meet."""
        torch.distributed.init_process_group(
            "gloo" if self.device == "cpu" else "nccl",
            init_method=f"file://{os.environ['BENCH_MEET']}",
            rank=int(os.environ["JAX_PROCESS_ID"]),
            world_size=world,
        )
        return torch.nn.parallel.DistributedDataParallel(self.model)

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
            batch = self.batches[step % NUM_BATCHES]
            for part, rows in enumerate(
                zip(*(x.chunk(parts) for x in batch.values()), strict=True)
            ):
                # Several processes exchange the gradient of the whole alone.
                alone = part < parts - 1 and self.trained is not self.model
                with self.trained.no_sync() if alone else contextlib.nullcontext():
                    with self._precision():
                        loss = self.family.loss(model, dict(zip(batch, rows, strict=True)))
                    (loss / parts).backward()
            if self.optim["clip_norm"]:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim["clip_norm"])
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)

    def _decode(self, steps: int, **options: str) -> None:
        prompt = self.batches[0]["input_ids"][: self.shape["rows"], : self.shape["prompt"]]
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
