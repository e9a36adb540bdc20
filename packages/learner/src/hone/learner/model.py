"""Transformers models behind two small modules: PolicyModel (tokens -> log-probabilities) and CriticModel (tokens -> values).

Both run over packed rows [T], through `attention/varlen.py`, with dropout off at all times: the log-probability of a token must
not depend on when it was computed. Their `named_weights` are named as in the checkpoint they came from.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from hone.learner.adapters import PLAIN, Adaptation, Adapted, Task, adapt
from hone.learner.attention.varlen import row_arguments
from hone.learner.context import Piece
from hone.learner.errors import ModelError
from hone.learner.head_files import HEADS, HeadKind, check_head, classifier_config, forget_statistics, load_head
from hone.learner.heads import Head, TokenHead
from hone.learner.logprobs import Slopes
from hone.learner.mixture import Hear, check_mixture
from hone.learner.model_files import head_name, resolve
from hone.learner.over_logits import OverLogits
from hone.learner.packed_probe import check_packed
from hone.learner.published import Layer, Named, adapted, layers, parameters_of
from hone.learner.quantised import in_four_bits, settle
from hone.learner.vision import Attached, Sight, attention, sees

CHUNK_BYTES = {"cpu": 160 * 2**20, "cuda": 2**28}
"""Logits that exist at once, in the weights' format [bytes]: more on a GPU, where larger products pay."""


class PolicyModel(nn.Module):
    """A causal language model that answers with the log-probability and the entropy of each action token; with `sight`, of images, too."""

    def __init__(self, causal_lm: PreTrainedModel, *, device_type: str, sight: Sight | None = None) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.sight = sight
        self.adapted = Adapted()
        self.hear_routing: Hear | None = None
        softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
        output = causal_lm.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise ModelError(f"{type(causal_lm).__name__} has no linear output embedding; name a causal language model")
        self.head = TokenHead(output, softcap=softcap, chunk_bytes=CHUNK_BYTES[device_type])

    def forward(
        self,
        tokens: Int[Tensor, " T"],
        position_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " N_plus_1"],
        action_mask: Bool[Tensor, " T"],
        temperature: float,
        with_entropy: bool,
        piece: Piece | None = None,
        slopes: Slopes | None = None,
        over: OverLogits | None = None,
        attached: Attached = (),
    ) -> tuple[Tensor, ...] | tuple[Float[Tensor, " T"], Float[Tensor, " T"] | None]:
        """Log-probability and, if asked for, entropy of each token in the mask [nats] at `temperature`; zero elsewhere.

        With a `piece`, of the tokens whose predicting state it holds. `slopes` as in `token_logprobs`; `over` as in `TokenHead`.
        """
        settings = {"hear": self.hear_routing, "sight": self.sight, "attached": attached}
        hidden = packed_hidden(self.causal_lm.base_model, tokens, position_ids, cu_seqlens, piece, **settings)
        places = piece and piece.places
        return self.head(hidden, tokens, cu_seqlens, action_mask, temperature, with_entropy, places, slopes, over)

    def named_weights(self) -> list[Named]:
        """Every parameter once, an adapter's too, by the model's own name; a tied output embedding is its input embedding."""
        return parameters_of(self.causal_lm)

    def published(self) -> list[Layer]:
        """The weights to hand out, as the checkpoint has them, adapters merged."""
        return layers(self.named_weights(), adapted(self.causal_lm), self.causal_lm)

    def adaptable(self) -> tuple[PreTrainedModel, None, Task]:
        """See `Adaptable`."""
        return self.causal_lm, None, "CAUSAL_LM"

    def save(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Writes `weights` (named as `published`) and the configuration in Hugging Face format."""
        with _quiet():
            _stored_config(self.causal_lm).save_pretrained(directory)
            if self.causal_lm.generation_config is not None and self.causal_lm.can_generate():
                self.causal_lm.generation_config.save_pretrained(directory)
        save_torch_state_dict(weights, directory)


class CriticModel(nn.Module):
    """A transformer with a value, reward or process head; its weights are named as in transformers' classifier with that head."""

    def __init__(self, backbone: PreTrainedModel, head: Head, *, value_head_prefix: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = head
        self.prefixes = {"backbone": backbone.base_model_prefix, "value_head": value_head_prefix}
        self.adapted = Adapted()
        self.hear_routing: Hear | None = None

    def forward(
        self,
        tokens: Int[Tensor, " T"],
        position_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " N_plus_1"],
        action_mask: Bool[Tensor, " T"],
        piece: Piece | None = None,
        attached: Attached = (),
    ) -> Tensor:
        """What the head reads: values [T], scores [N] or label logits [T, C]; zero where a `piece` does not hold the state."""
        hidden = packed_hidden(self.backbone, tokens, position_ids, cu_seqlens, piece, hear=self.hear_routing, attached=attached)
        return self.value_head.read(hidden, cu_seqlens, action_mask, piece and piece.places)

    def named_weights(self) -> list[Named]:
        """Every parameter once, an adapter's too, by its name in a sequence classifier."""
        return [(self._prefixed(name), parameter) for name, parameter in parameters_of(self)]

    def published(self) -> list[Layer]:
        """The weights to hand out, as the checkpoint has them, adapters merged."""
        return layers(self.named_weights(), {self._prefixed(name): layer for name, layer in adapted(self).items()}, self.backbone)

    def adaptable(self) -> tuple[PreTrainedModel, str, Task]:
        """See `Adaptable`."""
        task: Task = "TOKEN_CLS" if self.value_head.architecture == "ForTokenClassification" else "SEQ_CLS"
        return self.backbone, self.prefixes["value_head"], task

    def _prefixed(self, name: str) -> str:
        part, _, rest = name.partition(".")
        return f"{self.prefixes[part]}.{rest}"

    def save(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Writes `weights` (named as `published`) as transformers' own classifier with this head."""
        _in_full(classifier_config(self.backbone, self.value_head, self.prefixes["value_head"])).save_pretrained(directory)
        save_torch_state_dict(weights, directory)


Model = TypeVar("Model", PolicyModel, CriticModel)


def packed_hidden(
    backbone: Any,
    tokens: Int[Tensor, " T"],
    position_ids: Int[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    piece: Piece | None = None,
    *,
    hear: Hear | None = None,
    sight: Sight | None = None,
    attached: Attached = (),
) -> Float[Tensor, "S H"]:
    """Last hidden states of packed rows, each row as if it were alone; of all tokens, or of a `piece`'s, in its order.

    A mixture's router logits go to `hear`; what is `attached` to rows is shown to the model through `sight`. Raises ValueError
    for rows with images and a model that has none.
    """
    if sight is None and any(attached):
        raise ValueError(
            f"rows have images, and {type(backbone).__name__} reads text only; give every role a vision-language model, choose an "
            "algorithm without a critic, or train on rows without images"
        )
    if piece is not None:
        tokens, position_ids = tokens[piece.index], position_ids[piece.index]
    arguments = row_arguments(cu_seqlens) if piece is None else piece.row_arguments()
    if hear is not None:
        arguments["output_router_logits"] = True
    if sight is None:
        arguments |= {"input_ids": tokens[None], "position_ids": position_ids[None]}
    else:
        arguments |= sight.inputs(backbone, tokens, position_ids, cu_seqlens, attached)
        backbone = backbone.language_model
    output = backbone(use_cache=False, **arguments)
    if hear is not None:
        hear(output.router_logits if piece is None else tuple(logits[: piece.held] for logits in output.router_logits))
    return output.last_hidden_state[0]


def hidden_size(directory: Path) -> int:
    """Of the language model in `directory`, from its configuration alone."""
    return int(AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config().hidden_size)


def check_policy(name: str, *, adaptation: Adaptation = PLAIN, aux_loss_coef: float = 0.0) -> None:
    """Raises ModelError for an `adaptation` or a balancing loss that does not fit the model; no weight is read."""
    if not (adaptation.needs_names or aux_loss_coef):
        return
    directory = resolve(name)
    skeleton = _skeleton(_policy_class(_config(directory)), directory, torch.float32)
    check_mixture(skeleton.base_model, name, coef=aux_loss_coef)
    adapt(PolicyModel(skeleton, device_type="cpu"), adaptation, name)


def load_policy(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gradient_checkpointing: bool = False,
    adaptation: Adaptation = PLAIN,
    aux_loss_coef: float = 0.0,
) -> PolicyModel:
    """A causal language model from a directory or hub id, safetensors only, on `device`, in evaluation mode.

    Raises ModelError for a name that leads nowhere, pickled weights, models that bring their own code, missing weights, what
    `check_policy` refuses, and architectures whose log-probabilities over packed rows do not come out as transformers' own
    forward has them.
    """
    directory = resolve(name)
    config = _config(directory)
    sight = Sight(directory, config) if sees(config) else None
    check_policy(name, adaptation=adaptation, aux_loss_coef=aux_loss_coef)
    causal_lm = _load(_policy_class(config), directory, dtype, device, four_bit=adaptation.four_bit)
    model = PolicyModel(causal_lm, device_type=device.type, sight=sight)
    check_packed(model, name, dtype)
    return _prepare(adapt(model, adaptation, name), gradient_checkpointing)


def check_critic(
    name: str,
    *,
    value_head_prefix: str,
    kind: HeadKind = "critic",
    labels: int = 1,
    normalize: bool = False,
    must_be_stored: bool = False,
    adaptation: Adaptation = PLAIN,
    aux_loss_coef: float = 0.0,
) -> None:
    """Raises ModelError as `check_policy` and `check_head`, and for models that cannot have such a head; no weight is read."""
    directory = resolve(name)
    skeleton = _skeleton(AutoModel, directory, torch.float32)
    if sees(skeleton.config):
        raise ModelError(
            f"{name} is a vision-language model, which cannot be a critic, reward or process model here; choose an algorithm without a "
            "critic (grpo, rloo, reinforce), or name a language model for this role"
        )
    check_mixture(skeleton.base_model, name, coef=aux_loss_coef)
    prefix, size = head_name(directory, value_head_prefix), skeleton.config.get_text_config().hidden_size
    fresh = HEADS[kind](size, labels, dtype=torch.float32)
    if kind != "critic":
        classifier_config(skeleton, fresh, prefix)
    if adaptation.needs_names:
        adapt(CriticModel(skeleton, fresh, value_head_prefix=prefix), adaptation, name)
    with _refused(directory):
        check_head(directory, kind, hidden_size=size, labels=labels, prefix=prefix, normalize=normalize, must_be_stored=must_be_stored)


def load_critic(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    value_head_prefix: str,
    gradient_checkpointing: bool = False,
    adaptation: Adaptation = PLAIN,
    kind: HeadKind = "critic",
    labels: int = 1,
    normalize: bool = False,
    must_be_stored: bool = False,
    aux_loss_coef: float = 0.0,
) -> CriticModel:
    """A critic, reward or process model from a causal language model (fresh head) or from a saved one (its own); see `load_head`.

    Raises ModelError as `load_policy` and `check_critic`.
    """
    directory = resolve(name)
    head_settings = {"labels": labels, "normalize": normalize, "must_be_stored": must_be_stored}
    asked = {"kind": kind, **head_settings, "adaptation": adaptation, "aux_loss_coef": aux_loss_coef}
    check_critic(name, value_head_prefix=value_head_prefix, **asked)
    prefix = head_name(directory, value_head_prefix)
    with _refused(directory):
        head = load_head(directory, kind, hidden_size=hidden_size(directory), prefix=prefix, dtype=dtype, **head_settings).to(device)
    backbone = _load(AutoModel, directory, dtype, device, four_bit=adaptation.four_bit)
    if kind == "reward" and not must_be_stored:
        forget_statistics(backbone.config)
    return _prepare(adapt(CriticModel(backbone, head, value_head_prefix=prefix), adaptation, name), gradient_checkpointing)


def _policy_class(config: Any) -> Any:
    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def _config(directory: Path) -> Any:
    with _refused(directory):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def _skeleton(auto_class: Any, directory: Path, dtype: torch.dtype) -> Any:
    """The model without its weights: the names of its parts, and their shapes."""
    config = _config(directory)
    with _quiet(), _refused(directory), torch.device("meta"):
        return auto_class.from_config(config, dtype=dtype, trust_remote_code=False)


def _load(auto_class: Any, directory: Path, dtype: torch.dtype, device: torch.device, *, four_bit: bool) -> Any:
    with _quiet(), _refused(directory):
        model, missing = auto_class.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention(_config(directory)),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **(in_four_bits(dtype, device) if four_bit else {}),
        )
    missing = sorted(missing["missing_keys"])
    if missing:
        raise ModelError(f"{directory} lacks {len(missing)} weights ({', '.join(missing[:3])}, ...); copy all *.safetensors files there")
    if not four_bit:
        return model.to(device)
    settle(model, str(directory))
    return model


@contextlib.contextmanager
def _refused(directory: Path) -> Iterator[None]:
    """What transformers says of a model it cannot read, as a ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        advice = "the model brings its own code, which is not run here; use one of an architecture that transformers has"
        if "trust_remote_code" not in str(error):
            advice = "name a causal language model of an architecture that transformers has, with all its files"
        raise ModelError(f"{directory} cannot be loaded ({reason}); {advice}") from error


def _prepare(model: Model, gradient_checkpointing: bool) -> Model:
    """Evaluation mode throughout; layers to recompute are marked as training on their own, so no dropout below them wakes."""
    model.eval()
    if gradient_checkpointing:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.gradient_checkpointing_enable({"use_reentrant": False})
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    return model


def _stored_config(model: PreTrainedModel) -> Any:
    """The configuration of the weights as they are handed out."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return _in_full(config)


def _in_full(config: Any) -> Any:
    """The configuration without what it says of weights in 4 bits: they are handed out in full."""
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no report on what a backbone leaves unread: what is missing is checked above."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
