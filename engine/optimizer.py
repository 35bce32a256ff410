"""AdamW that reads gradients where they lie.

PyTorch's fused AdamW for the CPU walks parameter, gradient and moments as flat memory, and copies
beforehand each gradient that is not contiguous, into memory that nothing reads. Weights of
convolutions in channels_last memory are such: in a training step these were the largest of the
copies. Here it gets them as the views that are contiguous, (N, H, W, C), of the same memory.
"""

from __future__ import annotations

import torch


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, its state and its bits: Loshchilov & Hutter 2019, alg. 2."""

    def _init_group(self, group, params, grads, *more):
        """Its lists of tensors, those of a parameter in one layout. A torch that calls this no
        longer takes the slower way, to the same numbers."""
        found = super()._init_group(group, params, grads, *more)
        *moments, _ = more  # the last are the steps
        for i, p in enumerate(params):
            if type(p) not in (torch.Tensor, torch.nn.Parameter):  # sharded ones are neither
                continue
            if not p.is_cpu or p.dim() != 4 or p.is_contiguous():
                continue
            if not p.is_contiguous(memory_format=torch.channels_last):
                continue
            if grads[i].stride() != p.stride():  # as flat memory it is another one's gradient
                grads[i] = torch.empty_like(p).copy_(grads[i])
            for tensors in moments:  # of a state that was loaded, or made in another layout
                if tensors and tensors[i].stride() != p.stride():
                    tensors[i].data = torch.empty_like(p).copy_(tensors[i])
            for tensors in (params, grads, *moments):
                if tensors:  # one moment more with amsgrad
                    tensors[i] = tensors[i].detach().permute(0, 2, 3, 1)
        return found
