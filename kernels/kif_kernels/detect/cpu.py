"""`detect` on the CPU: the screen's pairs, put into the buffers. Suppression there screens for itself; it need not be
called first.
"""

import torch
from torch import Tensor

from ..layout import Candidates, SiteTensors
from ..suppress.cpu_screen import may_fire
from ..suppress.reference import flatten


def detect(x: Tensor, rows: Tensor, site: SiteTensors, candidates: Candidates, residual: Tensor | None = None) -> None:
    """`kif_kernels.detect` for fp16, bf16 and fp32 tensors on the CPU."""
    candidates.count.zero_()
    if x.numel() == 0:
        return
    tokens, token_rows = flatten(x if residual is None else x.float() + residual.float(), rows)
    token, slot = may_fire(tokens, rows, token_rows, site)
    if token.numel() == 0:
        return
    entry = torch.arange(len(token)) - torch.searchsorted(token, token)  # tokens come in ascending order
    fits = entry < candidates.found.shape[1]
    place = site.place[token_rows[token].long(), slot]
    candidates.found[token[fits], entry[fits]] = place[fits]
    candidates.count.copy_(token.bincount(minlength=len(tokens)))
