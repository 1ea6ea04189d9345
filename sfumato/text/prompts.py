"""What a prompt says to the text encoders of Stable Diffusion: words with weights, in parts of 75 tokens, names of learned vectors among them.

Signs and parts are those of AUTOMATIC1111's interface, which most prompts are written for: (word) is 1.1 times as strong, (word:1.3) 1.3 times,
[word] 1 / 1.1 times, BREAK begins another part, and a backslash before a bracket makes it a sign like others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from sfumato.core.request import TAG
from sfumato.core.seams import Cond
from sfumato.text.clip import END, START, ClipText
from sfumato.text.learned import by_names, numbered, with_learned

SIGNS = re.compile(
    r"\\[\\()\[\]]|(?P<close>:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\))|[()\[\]]|(?P<pause>\s*\bBREAK\b\s*)|[^\\()\[\]:\s]+|\s+|.", re.DOTALL
)
STRONGER = 1.1  # one pair of brackets
BREAK = "BREAK"
NEAR = 20  # tokens after a comma that go on to the next part with what follows, where a part is full

Run = tuple[str, float]


def weighted(prompt: str) -> list[Run]:
    """[(text, weight)], neighbours of one weight together; (BREAK, -1) where another part begins. Brackets left open end with the prompt."""
    runs: list[list[str | float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def times(start: int, factor: float) -> None:
        for run in runs[start:]:
            if run[0] != BREAK:
                run[1] = float(run[1]) * factor

    for found in SIGNS.finditer(prompt):
        sign = found.group()
        if found["pause"]:
            runs.append([BREAK, -1.0])
        elif sign in opened:
            opened[sign].append(len(runs))
        elif found["close"] and opened["("]:
            times(opened["("].pop(), float(found["weight"]))
        elif sign == ")" and opened["("]:
            times(opened["("].pop(), STRONGER)
        elif sign == "]" and opened["["]:
            times(opened["["].pop(), 1 / STRONGER)
        else:
            runs.append([sign[1:] if len(sign) == 2 and sign[0] == "\\" else sign, 1.0])
    for starts, factor in ((opened["("], STRONGER), (opened["["], 1 / STRONGER)):
        for start in starts:
            times(start, factor)
    whole: list[Run] = []
    for text, weight in runs:
        if whole and whole[-1][1] == weight and BREAK not in (text, whole[-1][0]):
            whole[-1] = (whole[-1][0] + str(text), whole[-1][1])
        else:
            whole.append((str(text), float(weight)))
    return whole or [("", 1.0)]


@dataclass
class Ear:
    """A text encoder with its tokens. `pad` fills a part up after its end; states are usually taken from the `layer`-th block from the end (1: the
    last), through the final norm where `normed`. `learned` are vectors "n d" by the names that stand for them in prompts.
    """

    network: ClipText
    tokenizer: Tokenizer
    pad: int
    layer: int = 1
    normed: bool = True
    learned: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = [self.tokenizer.token_to_id(t) for t in (START, END)]
        if None in ids:
            raise ValueError(f"the tokenizer must know {START} and {END}: it is not of CLIP")
        self.start, self.end = ids
        self.comma = self.tokenizer.token_to_id(",</w>")

    @property
    def width(self) -> int:
        """Numbers of a token's vector."""
        return self.network.config.width

    @property
    def room(self) -> int:
        """Tokens of a part, without its start and end."""
        return self.network.config.tokens - 2

    def pieces(self, text: str) -> list[list[int]]:
        """Its tokens one by one, and where a name of learned vectors stands all of those together, numbered after the vocabulary."""
        first = numbered(self.learned, self.network.config.vocabulary)
        found: list[list[int]] = []
        for part, name in by_names(text, self.learned):
            found += [[i] for i in self._ids(part)] if name is None else [first[name]]
        return found

    def known(self, words: str) -> tuple[Tensor, list[int]]:
        """The vectors of all tokens, and which of them words are."""
        return self.network.embeddings.token_embedding.weight, self._ids(words)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def parts(self, prompt: str) -> list[tuple[list[int], list[float]]]:
        """[(tokens, their weights)] of at most `room` each. A full part ends after its last comma where that is near."""
        done: list[tuple[list[int], list[float]]] = []
        ids: list[int] = []
        weights: list[float] = []
        comma = -1  # where the last one is

        def close() -> None:
            nonlocal ids, weights, comma
            done.append((ids, weights))
            ids, weights, comma = [], [], -1

        for text, weight in weighted(TAG.sub("", prompt)):
            if text == BREAK and weight < 0:
                close()
                continue
            for piece in self.pieces(text):
                if piece == [self.comma]:
                    comma = len(ids)
                elif len(ids) == self.room and comma >= 0 and len(ids) - comma <= NEAR:
                    cut = comma + 1
                    rest = ids[cut:], weights[cut:]
                    ids, weights = ids[:cut], weights[:cut]
                    close()
                    ids, weights = rest
                if ids and len(ids) + len(piece) > self.room:
                    close()
                ids += piece[: self.room]
                weights += [weight] * len(piece[: self.room])
        if ids or not done:
            close()
        return done

    def filled(self, ids: Sequence[int]) -> list[int]:
        """With start and end, as long as the encoder hears."""
        return [self.start, *ids, self.end, *[self.pad] * (self.room - len(ids))]

    @property
    def most_skip(self) -> int:
        """The largest clip-skip: 1 is what is usually heard, 2 one block before it."""
        return self.network.config.depth - self.layer + 1

    def hear(self, ids: Int[Tensor, "b n"], weights: Float[Tensor, "b n"], skip: int = 1) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b p"]]:
        """States, as strong as their weights say, of the same mean as without; and the pooled text."""
        net, layer = self.network, self.layer + skip - 1
        if not 1 <= skip <= self.most_skip:
            raise ValueError(f"clip_skip (={skip}) must be from 1 to {self.most_skip}: the blocks of this text encoder")
        states = net.hidden(F.embedding(ids, with_learned(net.embeddings.token_embedding.weight.float(), self.learned)))
        chosen = states[len(states) - layer]
        chosen = net.final_layer_norm(chosen) if self.normed else chosen
        if bool((weights != 1).any()):
            mean = chosen.mean((1, 2), keepdim=True)
            chosen = chosen * weights[:, :, None]
            weighed = chosen.mean((1, 2), keepdim=True)
            chosen = chosen * torch.where(weighed == 0, 1.0, mean / weighed)
        return chosen, net.pooled(states[-1], ids)


def heard(ears: Sequence[Ear], prompts: Sequence[str], skip: int = 1, dtype: torch.dtype = torch.float32) -> Cond:
    """What all ears hear: text "b 77k d" of the longest prompt's k parts, side by side, and the pooled text of the first part by the last ear. Where
    others have fewer parts a mask "b 77k" leaves what fills them up unheard: a prompt is the same beside any other.
    """
    texts, pooled = [], None
    parted = [[ear.parts(p) for p in prompts] for ear in ears]
    counts = [max(len(of_ear[i]) for of_ear in parted) for i in range(len(prompts))]
    most, mask = max(counts), None
    for ear, said in zip(ears, parted, strict=True):
        rows = [part for parts in said for part in (*parts, *[([], [])] * (most - len(parts)))]
        device = ear.network.final_layer_norm.weight.device
        ids = torch.tensor([ear.filled(i) for i, _ in rows], device=device)
        weights = torch.tensor([[1.0, *w, *[1.0] * (ear.room + 1 - len(w))] for _, w in rows], device=device)
        states, pool = ear.hear(ids, weights, skip)
        texts.append(states.reshape(len(prompts), -1, states.shape[2]).to(dtype))
        pooled = pool.reshape(len(prompts), most, -1)[:, 0].to(dtype)
        if min(counts) < most:
            mask = (torch.arange(most, device=device) < torch.tensor(counts, device=device)[:, None]).repeat_interleave(ear.room + 2, dim=1)
    return Cond(text=torch.cat(texts, dim=2), mask=mask, pooled=pooled)
