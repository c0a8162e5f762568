"""States of a paged optimizer after they were loaded: in managed memory again, where the GPU may push them out.

bitsandbytes marks its paged tensors by an attribute. `torch.save` keeps the attribute and not the kind of memory, so what comes
back is either unpaged (loaded over the CPU) or ordinary GPU memory that says it is paged (loaded onto the GPU, as transformers
does where several processes train), on which the next step dies with `Error invalid argument`.
"""

from __future__ import annotations

from typing import Any

PAGED = ("state1", "state2")
"""The states that bitsandbytes pages, one number for each of the parameter's."""


def page_again(optimizer: Any) -> None:
    """Moves the loaded states of a paged bitsandbytes optimizer to where its own `init_state` would have put them.

    The numbers stay as they are; other optimizers are left alone.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not getattr(inner, "is_paged", False):
        return
    for parameter, state in inner.state.items():
        for name in PAGED:
            if name in state:
                buffer = inner.get_state_buffer(parameter, dtype=state[name].dtype)
                buffer.copy_(state[name])
                state[name] = buffer
