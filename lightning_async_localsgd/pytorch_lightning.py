"""To be imported before ``pytorch_lightning``, which from then on names ``lightning.pytorch``.

Example::

    import lightning_async_localsgd.pytorch_lightning  # first of all imports
    from darts.models import TCNModel
"""

from lightning_async_localsgd.aliasing import alias_pytorch_lightning

alias_pytorch_lightning()
