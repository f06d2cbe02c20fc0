"""Import this module before ``pytorch_lightning``, to make that a name of ``lightning.pytorch``.

Example::

    import lightning_async_localsgd.pytorch_lightning  # first of all imports
    from darts.models import TCNModel
"""

from lightning_async_localsgd.aliasing import alias_pytorch_lightning

alias_pytorch_lightning()
