"""Reading a published config.json: every key is understood, known to change nothing, or refused."""

from pathlib import Path

from llmlib.errors import CheckpointError, UnsupportedArchitectureError

_REQUIRED = object()

# Keys that say how a model was trained, packed or served, and don't change what it computes.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout
    attn_dropout attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    embedding_dropout encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout gradient_checkpointing id2label
    initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id
    length_penalty max_length max_position_embeddings min_length model_type n_ctx n_positions name no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values rescale_prenorm_residual residual_dropout resid_dropout resid_pdrop repetition_penalty
    return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise router_z_loss_coef sep_token_id
    seq_length summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
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
            if self.data.get(key) is not None:
                return self.data[key]
        if default is _REQUIRED:
            raise CheckpointError(f"{self.file} has no {name!r}, which {self.data.get('model_type')!r} models need")
        return default

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
        value = self(name, default) if default is not None else self(name)
        if value not in table:
            raise UnsupportedArchitectureError(
                f"{self.file}: {name} is {value!r}; llmlib knows {', '.join(map(str, table))}"
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


ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu", "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu",
}  # fmt: skip

_SCALING_OPTIONS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_NEEDS_ORIGINAL = ("dynamic", "yarn", "longrope", "llama3")


def rotary(c: Keys, head_dim: int, *, theta: float = 10000.0, fraction: float = 1.0, layer_type: str | None = None):
    """Options of `Attention` for rotary positions, from either spelling of them.

    As published: `rope_theta`, `partial_rotary_factor` and `rope_scaling`. As transformers 5 writes it: all three in
    `rope_parameters`, which may hold one entry for each type of layer.
    """
    given = dict(c("rope_parameters", {}))
    c.ignore("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
    if layer_type in given:
        given = dict(given[layer_type] or {})
    if not given:
        given = dict(c("rope_scaling", {}))
    base = given.pop("rope_theta", None) or c("rope_theta", theta, also=("rotary_emb_base",))
    part = given.pop("partial_rotary_factor", None) or c("partial_rotary_factor", fraction, also=("rotary_pct",))
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    options = {"rope_theta": float(base), "rope_dim": None if part == 1 else int(head_dim * part)}
    if kind == "default":
        return options
    if kind == "su":
        kind = "longrope"
    if kind not in _SCALING_OPTIONS:
        raise UnsupportedArchitectureError(
            f"{c.file}: the rotary scaling {kind!r} isn't known; llmlib has {', '.join(_SCALING_OPTIONS)}"
        )
    return options | {"rope_scaling": _scaling(c, kind, given)}


def _scaling(c: Keys, kind: str, given: dict) -> dict:
    length = c("max_position_embeddings")
    original = given.pop("original_max_position_embeddings", None) or c("original_max_position_embeddings", length)
    unknown = {k: v for k, v in given.items() if k not in _SCALING_OPTIONS[kind] and v is not None}
    if unknown:
        raise UnsupportedArchitectureError(f"{c.file}: the rotary scaling {kind!r} has unknown options {unknown}")
    scaling = {"type": kind, **{k: v for k, v in given.items() if v is not None}}
    if kind == "longrope":
        scaling.setdefault("factor", length / original)
    if kind in _NEEDS_ORIGINAL:
        scaling["original_max_position_embeddings"] = length if kind == "dynamic" else original
    return scaling
