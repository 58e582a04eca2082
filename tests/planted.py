"""A circuit planted in a language model by hand: induction, with an MLP on top.

The residual stream holds five slots, written as pairs of opposite channels so that LayerNorm takes
no mean off: the token, its position, the token before it, what to predict, and how surely.

    layer 0, attention  reads the position; looks at the token before; copies it: token -> before
    layer 1, attention  looks where the token before is this one; copies what is there, less
                        INHIBITED of the token before it: token, before -> predicted
    layer 1, MLP        relu(predicted - THRESHOLD) -> sure
    unembedding         predicted + sure

Lorsas with a head for each token and a transcoder with a feature for each are these modules
exactly, so there are no errors.
"""

from typing import Any

import torch
import transformers
from lorsa.dictionaries.dictionary import Dictionary
from lorsa.dictionaries.linear_config import TranscoderConfig
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.sites import Ports
from torch import Tensor

N_TOKENS, N_POSITIONS = 5, 24
SLOTS = {"token": N_TOKENS, "position": N_POSITIONS} | dict.fromkeys(
    ("before", "predicted", "sure"), N_TOKENS
)
D_MODEL = 2 * sum(SLOTS.values())
A, B = 1, 2
PROMPT = torch.tensor([0, A, B, 3, A])
"""After A came B once: B is predicted at the last token, from the token at 2."""
INHIBITED, THRESHOLD, SHARP = 0.05, 0.5, 20.0


def directions(slot: str) -> Tensor:
    """Return the directions of a slot, unit vectors, [n, D_MODEL]."""
    first = 0
    for name, n in SLOTS.items():
        if name == slot:
            eye = torch.eye(D_MODEL // 2)[first : first + n]
            return torch.cat([eye, -eye], dim=1) * 0.5**0.5
        first += n
    raise KeyError(slot)


def _reads(layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what queries, keys and values read, and what is written, each [n, D_MODEL]."""
    token, before = directions("token"), directions("before")
    if layer == 0:
        position = directions("position")
        return position, position.roll(1, dims=0), token, before
    return token, before, token - INHIBITED * before.roll(1, dims=0), directions("predicted")


def _into(module: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    """Set a Conv1D of GPT-2, [n_in, n_out]."""
    module.weight.zero_()[: weight.shape[0], : weight.shape[1]] = weight
    module.bias.zero_()
    if bias is not None:
        module.bias[: len(bias)] = bias


@torch.no_grad()
def planted_model() -> Any:
    """Return the language model: GPT-2's class, two layers of one head."""
    config = transformers.GPT2Config(
        vocab_size=N_TOKENS,
        n_positions=N_POSITIONS,
        n_embd=D_MODEL,
        n_inner=N_TOKENS,
        n_layer=2,
        n_head=1,
        activation_function="relu",
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.transformer.wte.weight.copy_(directions("token"))
    model.transformer.wpe.weight.copy_(directions("position"))
    model.lm_head.weight.copy_(directions("predicted") + directions("sure"))
    for layer, block in enumerate(model.transformer.h):
        q, k, v, o = (each.T for each in _reads(layer))
        qkv = torch.zeros(D_MODEL, 3 * D_MODEL)
        for part, reads in enumerate((SHARP * q, k, v)):
            qkv[:, part * D_MODEL : part * D_MODEL + reads.shape[1]] = reads
        _into(block.attn.c_attn, qkv)
        _into(block.attn.c_proj, o.T)
        _into(block.mlp.c_fc, torch.zeros(1, 1))
        _into(block.mlp.c_proj, torch.zeros(1, 1))
    _into(block.mlp.c_fc, directions("predicted").T, torch.full((N_TOKENS,), -THRESHOLD))
    _into(block.mlp.c_proj, directions("sure"))
    return model


@torch.no_grad()
def planted_dictionaries() -> dict[Ports, Dictionary]:
    """Return Lorsas of both layers and a transcoder of the second MLP, which are these modules."""
    made: list[Dictionary] = []
    for layer in range(2):
        sizes = {"d_model": D_MODEL, "n_qk_heads": 1, "d_qk_head": D_MODEL, "layer": layer}
        lorsa = Lorsa(
            LorsaConfig(
                **sizes, n_ov_heads=N_TOKENS, top_k=N_TOKENS, select="abs", scale=D_MODEL**-0.5
            )
        )
        q, k, v, o = _reads(layer)
        lorsa.W_Q[0, :, : len(q)], lorsa.W_K[0, :, : len(k)] = SHARP * q.T, k.T
        lorsa.W_V.copy_(v)
        lorsa.W_O.copy_(o)
        made.append(lorsa)
    config = TranscoderConfig(d_model=D_MODEL, n_features=N_TOKENS, top_k=N_TOKENS, layer=1)
    transcoder = Transcoder(config)
    transcoder.W_E.copy_(directions("predicted"))
    transcoder.b_E.fill_(-THRESHOLD)
    transcoder.W_O.copy_(directions("sure"))
    made.append(transcoder)
    return {dictionary.config.ports: dictionary.eval() for dictionary in made}
