"""CALM in Hugging Face `transformers`: importing this module registers it with `AutoConfig`, `AutoModelForCausalLM`.

    import calm_core.integrations.huggingface
    model = AutoModelForCausalLM.from_pretrained("exported")     # written by pretrain/convert.py export
    tokenizer = AutoTokenizer.from_pretrained("exported")
    text = tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=40)[0])

No code of the folder is executed. Autoregressive models are exported as Llama, which `transformers` loads unaided.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from calm_core.config.generation_config import GenerationOptions
from calm_core.errors import UserError
from calm_core.inference.generate import Completion, generate
from calm_core.inference.load_model import Loaded
from calm_core.reference.convert import load_reference

# What the Auto classes pass on, and what makes no difference to a folder whose code is never executed.
_WITHOUT_EFFECT = {"trust_remote_code", "adapter_kwargs", "revision", "local_files_only", "low_cpu_mem_usage"}


class CalmConfig(PreTrainedConfig):
    """`config.json` of an exported model, whose keys are attributes."""

    model_type = "calm"


class CalmForCausalLM(PreTrainedModel):
    """CALM with its autoencoder: token ids in, token ids out, a chunk of K at a time."""

    config_class = CalmConfig
    main_input_name = "input_ids"

    def __init__(self, config: CalmConfig, loaded: Loaded) -> None:
        super().__init__(config)
        self._loaded = loaded
        self.network, self.autoencoder = loaded.model, loaded.autoencoder

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        config: CalmConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
        **options: Any,
    ) -> "CalmForCausalLM":
        """The model in a folder that `pretrain/convert.py export` has written, for inference.

        Args:
            folder: local; a repository has to be downloaded first.
            config: of the folder, if it has been read already.
            dtype: of weights and activations; None and "auto" mean float32.
            device_map: a single device; None means the CPU.
            options: of `transformers`; those that would change the model are refused.

        Raises:
            UserError: the folder holds no such model, or an option cannot apply.
        """
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is not a local folder: download the model, and give the folder that it is in.")
        if asked := [name for name in sorted(options.keys() - _WITHOUT_EFFECT) if options[name] is not None]:
            raise UserError(f"{asked[0]} does not apply to CALM: leave it out.")
        dtype = torch.float32 if dtype in (None, "auto") else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        device = torch.device("cpu" if device_map is None else device_map)
        config = config or CalmConfig.from_pretrained(folder)
        return cls(config, load_reference(Path(folder), device, dtype)).eval()

    def forward(self, input_ids: Tensor) -> BaseModelOutput:
        """Hidden states `[B, S, d]`, one for each whole chunk of `input_ids` `[B, S K]`. There are no logits."""
        k = self._loaded.shape.k
        if input_ids.shape[1] % k:
            raise UserError(f"input_ids has {input_ids.shape[1]} tokens a row: give whole chunks of {k}.")
        hidden = self.network.hidden(input_ids.unflatten(1, (-1, k)))
        return BaseModelOutput(last_hidden_state=hidden.transpose(0, 1))

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        do_sample: bool = True,
        stop_strings: str | Sequence[str] = (),
        seed: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue each row; the rows as given, then the new tokens with eos where a document ends, then pad.

        Args:
            input_ids: `[B, T]`; a bos at the beginning is optional. None begins a document.
            attention_mask: `[B, T]`, 0 where a row is padded; None means nowhere.
            max_new_tokens: for each row, at most.
            temperature: T <= 1; T = 1/n unless `method="exact"`.
            do_sample: must be True: without likelihoods the most probable chunk is not known.
            stop_strings: texts that end a row.
            seed: of the first row's noise, the following ones have the following seeds; None draws it from torch's
                generator, so that `torch.manual_seed` decides it.
            options: further fields of `GenerationOptions`, such as `samples=200`.

        Returns:
            Token ids `[B, T + new]`.

        Raises:
            UserError: an option is unknown or out of bounds.
        """
        if not do_sample:
            raise UserError("do_sample=False asks for the most probable tokens, which CALM does not know: sample.")
        if unknown := options.keys() - GenerationOptions.__dataclass_fields__.keys():
            raise UserError(f"{min(unknown)} is not an option of CALM's generation: leave it out.")
        tokenizer = self._loaded.tokenizer
        given = torch.tensor([[tokenizer.bos]]) if input_ids is None else input_ids.cpu()
        known = torch.ones_like(given) if attention_mask is None else attention_mask.cpu()
        rows = [row[mask.bool()].tolist() for row, mask in zip(given, known, strict=True)]
        prompts = [row[1:] if row[:1] == [tokenizer.bos] else row for row in rows]
        completions = generate(
            self._loaded,
            prompts,
            GenerationOptions(
                max_tokens=max_new_tokens,
                temperature=temperature,
                stop=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
                seed=int(torch.randint(2**31, ())) if seed is None else seed,
                **options,
            ).for_head(self._loaded.has_logits),
        )
        new = [torch.tensor(self._new_tokens(completion), dtype=given.dtype) for completion in completions]
        padded = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=tokenizer.pad)
        return torch.cat([given, padded], 1).to(self.device)

    def _new_tokens(self, completion: Completion) -> list[int]:
        return completion.tokens + [self._loaded.tokenizer.eos] * (completion.reason == "eos")


AutoConfig.register(CalmConfig.model_type, CalmConfig, exist_ok=True)
AutoModel.register(CalmConfig, CalmForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM, exist_ok=True)
