"""Tiny models of every class that TransformerLens 4.3 lists and transformers can build, and of popular ones beside."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers

from tl_flash.weights.tiny import randomised, tiny_config

NAMES = """
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM AudioFlamingo3ForConditionalGeneration BambaForCausalLM
    BartForConditionalGeneration BertForMaskedLM BertLMHeadModel BioGptForCausalLM BitNetForCausalLM
    BlenderbotForConditionalGeneration BloomForCausalLM CodeGenForCausalLM Cohere2ForCausalLM CohereForCausalLM
    CTRLLMHeadModel DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM
    DiffLlamaForCausalLM DogeForCausalLM Dots1ForCausalLM Emu3ForCausalLM
    Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Exaone4ForCausalLM FalconForCausalLM FalconH1ForCausalLM
    FalconMambaForCausalLM FlexOlmoForCausalLM Florence2ForConditionalGeneration GPT2LMHeadModel GPTBigCodeForCausalLM
    GPTJForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM GPTNeoXJapaneseForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma4ForCausalLM
    Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration GlmAsrForConditionalGeneration
    GlmForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
    GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM HeliumForCausalLM HrmTextForCausalLM
    HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM Idefics3ForConditionalGeneration Jais2ForCausalLM
    JambaForCausalLM JetMoeForCausalLM LEDForConditionalGeneration LagunaForCausalLM Lfm2ForCausalLM
    Lfm2MoeForCausalLM Llama4ForCausalLM Llama4ForConditionalGeneration LlamaForCausalLM
    LlavaForConditionalGeneration LlavaNextForConditionalGeneration LlavaOnevisionForConditionalGeneration
    LongT5ForConditionalGeneration M2M100ForConditionalGeneration MBartForConditionalGeneration
    MT5ForConditionalGeneration Mamba2ForCausalLM MambaForCausalLM MarianMTModel MiniMaxM2ForCausalLM
    Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM MixtralForCausalLM
    ModernBertDecoderForCausalLM MptForCausalLM MuseGlimmerForConditionalGeneration
    MusicFlamingoForConditionalGeneration NanoChatForCausalLM NemotronForCausalLM NemotronHForCausalLM
    OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM
    OpenAIGPTLMHeadModel PegasusForConditionalGeneration PersimmonForCausalLM Phi3ForCausalLM PhiForCausalLM
    PhimoeForCausalLM PLBartForConditionalGeneration Qwen2AudioForConditionalGeneration Qwen2ForCausalLM
    Qwen2MoeForCausalLM Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM
    Qwen3NextForCausalLM Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
    RecurrentGemmaForCausalLM RobertaForMaskedLM RobertaForCausalLM RwkvForCausalLM SeedOssForCausalLM
    SmolLM3ForCausalLM StableLmForCausalLM Starcoder2ForCausalLM SwitchTransformersForConditionalGeneration
    T5ForConditionalGeneration T5Gemma2ForConditionalGeneration T5GemmaForConditionalGeneration
    VaultGemmaForCausalLM XGLMForCausalLM XLNetLMHeadModel YoutuForCausalLM Zamba2ForCausalLM
    xLSTMForCausalLM
""".split()
"""Those of TransformerLens 4.3's registry that transformers builds, and popular ones."""
NAMES += """
    AriaForConditionalGeneration AriaTextForCausalLM AXK1ForCausalLM AXK2ForCausalLM
    AyaVisionForConditionalGeneration BailingHybridForCausalLM BartForCausalLM BeamForCausalLM
    BertGenerationDecoder BigBirdPegasusForCausalLM BigBirdPegasusForConditionalGeneration BlenderbotForCausalLM
    BlenderbotSmallForCausalLM BlenderbotSmallForConditionalGeneration CamembertForCausalLM
    Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration Cosmos3EdgeForConditionalGeneration
    Cosmos3OmniForConditionalGeneration CwmForCausalLM DeepseekV32ForCausalLM
    DeepseekVLForConditionalGeneration DeepseekVLHybridForConditionalGeneration ElectraForCausalLM
    EvollaForProteinText2Text Exaone4_5_ForConditionalGeneration ExaoneMoeForCausalLM FlintForCausalLM
    FuyuForCausalLM Gemma4UnifiedForCausalLM GitForCausalLM
    Glm4vMoeForConditionalGeneration Glm5NextForConditionalGeneration GlmOcrForConditionalGeneration
    GotOcr2ForConditionalGeneration GraniteDoclingForConditionalGeneration GraniteMoeSWAForCausalLM
    GraniteSWAForCausalLM HyperCLOVAXForCausalLM HyperCLOVAXVisionV2ForConditionalGeneration HYV3ForCausalLM
    HYV4ForCausalLM Idefics2ForConditionalGeneration InklingForCausalLM InternVLForConditionalGeneration
    Kimi_K25ForConditionalGeneration KimiLinearForCausalLM Kolibri1ForCausalLM
    Lfm2VlForConditionalGeneration Lfm3ForCausalLM Lfm3VlForConditionalGeneration
    LightOnOcrForConditionalGeneration LlavaNextVideoForConditionalGeneration LongcatFlashForCausalLM
    MarianForCausalLM MBartForCausalLM MegatronBertForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM
    MiniCPM3ForCausalLM MiniCPMOcrForConditionalGeneration MiniCPMV4_6ForConditionalGeneration
    MiniCPMV4_7ForConditionalGeneration MiniMaxForCausalLM MiniMaxM3VLForCausalLM Mistral4ForCausalLM
    MistralLarge4ForConditionalGeneration MllamaForCausalLM MllamaForConditionalGeneration
    Molmo2ForConditionalGeneration MoshiForCausalLM MossTranscribeDiarizeForConditionalGeneration
    MuseSparkForConditionalGeneration MvpForCausalLM MvpForConditionalGeneration NllbMoeForConditionalGeneration
    Ovis2ForConditionalGeneration PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration
    PegasusForCausalLM Phi4MultimodalForCausalLM PLBartForCausalLM QianfanOCRForConditionalGeneration
    Qwen2VLForConditionalGeneration Qwen3ASRForConditionalGeneration Qwen3OmniMoeThinkerForConditionalGeneration
    RoFormerForCausalLM SeamlessM4TForTextToText SeamlessM4Tv2ForTextToText SmolVLMForConditionalGeneration
    SolarOpenForCausalLM TrOCRForCausalLM UMT5ForConditionalGeneration UnlimitedOcrForConditionalGeneration
    ZambaForCausalLM
""".split()
"""Others that transformers has."""

_LAYERS = """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
    num_decoder_layers num_blocks depth""".split()
N_LAYERS = 4


def few_layers(config, n: int):
    """A config of n layers: lists of one entry a layer become as long."""
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        before = next((getattr(part, name) for name in _LAYERS if isinstance(vars(part).get(name), int)), None)
        for name, value in list(vars(part).items()):
            if name in _LAYERS and isinstance(value, int):
                setattr(part, name, min(value, n))
            elif isinstance(value, list) and before is not None and len(value) == before:
                setattr(part, name, value[:n])
        if part is not config:
            few_layers(part, n)
    return config


@cache
def model(name: str):
    """A model of a class: float64, every number random."""
    model_class = getattr(transformers, name)
    given = copy.deepcopy(GIVEN.get(name, {}))  # configs change what they are given
    config = tiny_config(few_layers(model_class.config_class(**given), N_LAYERS))
    torch.manual_seed(1)
    made = randomised(model_class(config), seed=1)
    for path, parameter in made.named_parameters():
        if "per_layer_projection" in path:  # Gemma 4's embedding of each layer, which would read what neurons write
            parameter.data.zero_()
    assert sum(parameter.numel() for parameter in made.parameters()) < 120_000_000
    return made


_PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
_HUNYUAN = {"rope_type": "dynamic", "rope_theta": 10_000.0, "alpha": 1000.0, "factor": 1.0}
_GEMMA_4 = dict(num_hidden_layers=4, layer_types=["sliding_attention"] * 3 + ["full_attention"])
_EXPERTS = dict(n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=2, first_k_dense_replace=1)
GIVEN: dict[str, dict] = {
    "DeepseekV2ForCausalLM": _EXPERTS,
    "Dots1ForCausalLM": _EXPERTS,
    "Gemma3nForCausalLM": dict(num_kv_shared_layers=0),
    "Gemma4ForCausalLM": _GEMMA_4,
    "Gemma4ForConditionalGeneration": dict(text_config=_GEMMA_4),
    "Gemma4UnifiedForConditionalGeneration": dict(text_config=_GEMMA_4),
    "HunYuanDenseV1ForCausalLM": dict(rope_parameters=_HUNYUAN, head_dim=128),
    "HunYuanMoEV1ForCausalLM": dict(rope_parameters=_HUNYUAN, head_dim=128, num_experts=4, moe_topk=2),
    "Lfm2MoeForCausalLM": dict(
        num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "conv"], num_dense_layers=1
    ),
    "NemotronForCausalLM": dict(num_key_value_heads=8),
    "ZambaForCausalLM": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2),
    "MllamaForConditionalGeneration": dict(text_config=dict(num_hidden_layers=4, cross_attention_layers=[1])),
    "MllamaForCausalLM": dict(num_hidden_layers=4, cross_attention_layers=[1]),
}
_SECTIONS = dict(text_config=dict(rope_parameters=_PLAIN | dict(mrope_section=[16, 24, 24])))
GIVEN |= dict.fromkeys(["Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"], _SECTIONS)
_GLM_SECTIONS = dict(text_config=dict(rope_parameters=_PLAIN | dict(mrope_section=[8, 12, 12])))
GIVEN |= dict.fromkeys(
    [
        "Glm4vForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
        "GlmOcrForConditionalGeneration",
        "PaddleOCRVLForConditionalGeneration",
    ],
    _GLM_SECTIONS,
)
"""What the defaults of a class lack."""
_NO_MLP = "no layer's neurons can be read"
_MORE = "between the last layer and the unembedding is more than a norm"
REFUSED: dict[str, str] = {
    "BertForMaskedLM": _MORE,
    "BertLMHeadModel": _MORE,
    "FalconMambaForCausalLM": _NO_MLP,
    "Gemma3nForCausalLM": _MORE,
    "HrmTextForCausalLM": "run more than once",
    "Mamba2ForCausalLM": "layout was not found",
    "MambaForCausalLM": _NO_MLP,
    "ModernBertDecoderForCausalLM": _MORE,
    "RobertaForCausalLM": _MORE,
    "RobertaForMaskedLM": _MORE,
    "RwkvForCausalLM": _NO_MLP,
    "Zamba2ForCausalLM": _NO_MLP,
}
REFUSED |= dict.fromkeys(
    ["CamembertForCausalLM", "ElectraForCausalLM", "MegatronBertForCausalLM", "RoFormerForCausalLM"], _MORE
)
REFUSED |= dict.fromkeys(
    ["InklingForCausalLM", "LongcatFlashForCausalLM", "MuseSparkForConditionalGeneration", "ZambaForCausalLM"], _NO_MLP
)
"""What the refusal of a class says."""

TINY = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ROUTED_ALONE = """
    Cohere2MoeForCausalLM FlexOlmoForCausalLM GptOssForCausalLM GraniteMoeForCausalLM JetMoeForCausalLM
    MiniMaxM2ForCausalLM MixtralForCausalLM OlmoeForCausalLM PhimoeForCausalLM Qwen3MoeForCausalLM
    Qwen3VLMoeForConditionalGeneration Lfm2MoeForCausalLM JambaForCausalLM GraniteMoeSharedForCausalLM
    BeamForCausalLM GraniteMoeSWAForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM MiniMaxForCausalLM
    NllbMoeForConditionalGeneration Qwen3OmniMoeThinkerForConditionalGeneration
""".split()
"""Those whose last layer that has an MLP has no dense one and no shared expert."""
UNSAVED = ["Gemma4UnifiedForCausalLM", "GraniteDoclingForConditionalGeneration", "Molmo2ForConditionalGeneration"]
"""Those whose config, once made tiny, transformers does not load again."""
