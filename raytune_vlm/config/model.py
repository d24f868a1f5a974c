"""`model`: which base model is adapted."""

from typing import Literal

from pydantic import PrivateAttr

from raytune_vlm.config.section import Section


class ModelConfig(Section):
    """The frozen base model."""

    name: str = "demo"
    """`demo` (the tiny model that the package ships), `tiny:FAMILY` (a tiny random model of a
    family, for dry runs), a local folder, or a Hugging Face name."""
    revision: str | None = None
    """Commit or tag on the hub; None takes the default branch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights; adapters are always trained in float32."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the linear layers of the language model are held in 4 bits (QLoRA, Dettmers et al.
    2023), those of the vision tower and the projector in `dtype`, in which all is computed. Needs
    the extra `qlora`."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation, as transformers names it; `auto` takes the one that transformers
    takes for the family: sdpa where the family has it."""
    image_backend: Literal["auto", "pil", "torchvision"] = "auto"
    """Whose resampling the pixels are equal to, bit for bit: Pillow's or torchvision's (which need
    not be installed); `auto` takes the one that transformers would take here. They differ a little,
    so a model should be served with the one that it was tuned with."""

    # A private attribute and no field: neither YAML, nor an override, nor a search space, nor the
    # `experiment.json` of a copied sweep folder can hold it, and what is made from such data never
    # has it. It travels by pickle and `model_copy`. See `models/trust.py`.
    _trusted_revision: str | None = PrivateAttr(default=None)

    @property
    def trusted_revision(self) -> str | None:
        """The revision whose own code may run, as `--trust-remote-code` named it; else None."""
        return self._trusted_revision

    def trusting(self, revision: str | None) -> "ModelConfig":
        """A copy that allows the code of one revision to run: a commit, or a digest of a folder."""
        copy = self.model_copy()
        copy._trusted_revision = revision
        return copy
