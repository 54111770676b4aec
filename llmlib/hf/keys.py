"""Reading a published config.json: every key is understood, known to change nothing, or refused."""

import math
from pathlib import Path

from llmlib.errors import CheckpointError, UnsupportedArchitectureError

_REQUIRED = object()

# Keys that say how a model was trained, packed or served, and don't change what it computes.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels architectures
    attention_dropout attention_probs_dropout_prob attn_dropout attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    embedding_dropout encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout
    hidden_dropout_prob id2label
    initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id
    length_penalty max_length max_position_embeddings min_length model_type n_ctx n_positions n_special name
    no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_router_logits
    output_past output_scores pad_token_id predict_special_tokens prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values rescale_prenorm_residual residual_dropout resid_dropout resid_pdrop repetition_penalty
    return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise router_z_loss_coef sep_token_id
    seq_length summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    tokenizer_name top_k top_p
    torch_dtype torchscript transformers_version typical_p unk_token_id use_bfloat16 use_cache use_mamba_kernels
    use_mambapy use_return_dict
    """.split()  # noqa: SIM905
)


class Keys:
    """A config.json whose keys are ticked off as they are read; `finish` refuses those that nobody read."""

    def __init__(self, data: dict, file: Path):
        self.data, self.file, self.read = data, file, set()

    def __call__(self, name: str, default=_REQUIRED, *, also: tuple[str, ...] = ()):
        """The value of `name`, or of one of its other spellings. Null counts as absent."""
        self.read |= {name, *also}
        for key in (name, *also):
            if (value := self.data.get(key)) is not None:
                self._require_kind(key, value, default)
                return value
        if default is _REQUIRED:
            raise CheckpointError(f"{self.file} has no {name!r}, which {self.data.get('model_type')!r} models need")
        return default

    def _require_kind(self, name: str, value, default) -> None:
        """A number must be a number and a flag a flag, going by the default."""
        flag, number = isinstance(default, bool), isinstance(default, int | float)
        if flag and value not in (True, False):
            raise CheckpointError(f"{self.file}: {name} is {value!r}, and must be true or false")
        if number and not flag and (isinstance(value, bool) or not _is_finite(value)):
            raise CheckpointError(f"{self.file}: {name} is {value!r}, and must be a number")

    def nullable(self, name: str, default=None):
        """The value of a key for which null says something else than absence does."""
        self.read.add(name)
        return self.data.get(name, default)

    def presume(self, name: str, value) -> None:
        """Where the file says nothing about `name`, take this family's default for it."""
        if self.data.get(name) is None:
            self.data[name] = value

    def only(self, name: str, *allowed) -> None:
        """Refuse any value of `name` but these; the first is the default."""
        value = self(name, allowed[0])
        if value not in allowed:
            raise UnsupportedArchitectureError(
                f"{self.file}: {name} is {value!r}, and llmlib's {self.data.get('model_type')!r} has only "
                f"{' or '.join(map(repr, allowed))}"
            )

    def choice(self, name: str, table: dict, default: str | None = None):
        """The entry of `table` that `name` picks."""
        return self.look_up(name, self(name, default) if default is not None else self(name), table)

    def each(self, name: str, table: dict, default=_REQUIRED) -> list:
        """The entries of `table` that the list `name` picks, one for each layer."""
        return [self.look_up(name, value, table) for value in self(name, default)]

    def look_up(self, name: str, value, table: dict):
        """The entry of `table` for a value that `name` has or holds."""
        if value not in table:
            raise UnsupportedArchitectureError(
                f"{self.file}: {name} is {value!r}; llmlib's {self.data.get('model_type')!r} knows "
                f"{', '.join(map(str, table))}"
            )
        return table[value]

    def ignore(self, *names: str) -> None:
        """Tick off keys that change nothing in this family."""
        self.read |= set(names)

    def finish(self) -> None:
        """Raise for every key that nobody read, unless it is empty, off, or known to be harmless."""
        left = {
            k: v for k, v in self.data.items()
            if k not in self.read and k not in HARMLESS and v is not None and v is not False and v not in ([], {})
        }  # fmt: skip
        if left:
            listed = ", ".join(f"{k} = {v!r}" for k, v in sorted(left.items()))
            raise UnsupportedArchitectureError(
                f"{self.file}: llmlib doesn't understand {listed}, which may change the result. Remove the key if it "
                f"changes nothing"
            )


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu", "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu",
}  # fmt: skip

_SCALING_OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_NEEDS_ORIGINAL = ("dynamic", "yarn", "longrope", "llama3")


LAYER_TYPES = ("full_attention", "sliding_attention")


def rotary(
    c: Keys,
    head_dim: int,
    *,
    theta: float = 10000.0,
    fraction: float | None = None,
    names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    layer_type: str | None = None,
) -> dict:
    """Options of `Attention` for rotary positions, from either spelling of them.

    As published: a base and a fraction under `names`, and `rope_scaling`. As transformers 5 writes it: all three in
    `rope_parameters`; with a `layer_type`, in its entry there. Without a `fraction` the family always turns whole
    heads, and a file that says otherwise is refused.
    """
    given = _rope_parameters(c, layer_type)
    c.ignore(*names)
    base, part = given.pop("rope_theta", None), given.pop("partial_rotary_factor", None)
    base = c(names[0], theta) if base is None else base
    part = c(names[1], 1.0 if fraction is None else fraction) if part is None else part
    if fraction is None and part != 1:
        raise UnsupportedArchitectureError(
            f"{c.file}: {names[1]} is {part!r}, and {c.data.get('model_type')!r} always turns whole heads"
        )
    options = {"rope_theta": float(base), "rope_dim": None if part == 1 else int(head_dim * part)}
    scaling = _scaling(c, given, nested=layer_type is not None)
    return options | ({"rope_scaling": scaling} if scaling else {})


def _rope_parameters(c: Keys, layer_type: str | None) -> dict:
    """The dict that describes the rotation, of one type of layer where they differ."""
    given, scaling = dict(c("rope_parameters", {})), dict(c("rope_scaling", {}))
    if layer_type is None:
        return scaling or given
    for name in given:
        c.look_up("a key of rope_parameters", name, dict.fromkeys(LAYER_TYPES))
    own = dict(given.get(layer_type) or {"rope_type": "default"})
    return own | scaling if layer_type == "full_attention" else own


def _scaling(c: Keys, given: dict, nested: bool) -> dict | None:
    """What is left of a rotation's dict as `rope_scaling`; None when it scales nothing."""
    kind = _scaling_kind(c, given)
    original = given.pop("original_max_position_embeddings", None)
    options = _scaling_options(c, kind, given, nested)
    if kind == "default":
        return None
    length = c("max_position_embeddings")
    if original is None:
        original = length if nested else c("original_max_position_embeddings", length)
    if kind == "longrope":
        options.setdefault("factor", length / original)
    if kind in _NEEDS_ORIGINAL:
        options["original_max_position_embeddings"] = length if kind == "dynamic" else original
    return {"type": kind} | options


def _scaling_kind(c: Keys, given: dict) -> str:
    kind, older = given.pop("rope_type", None), given.pop("type", None)
    kind = kind or older or "default"
    kind = "longrope" if kind == "su" else kind
    if kind not in _SCALING_OPTIONS:
        raise UnsupportedArchitectureError(
            f"{c.file}: the rotary scaling {kind!r} isn't known; llmlib has {', '.join(_SCALING_OPTIONS)}"
        )
    return kind


def _scaling_options(c: Keys, kind: str, given: dict, nested: bool) -> dict:
    options = {k: v for k, v in given.items() if v is not None}
    # the reference reads truncate only where there is one dict for all layers
    known = set(_SCALING_OPTIONS[kind]) - ({"truncate"} if nested else set())
    unknown = {k: v for k, v in options.items() if k not in known}
    if unknown:
        raise UnsupportedArchitectureError(f"{c.file}: the rotary scaling {kind!r} has unknown options {unknown}")
    return options
