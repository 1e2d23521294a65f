"""What the stages exchange: image index, attention maps, index masks; read, write and check.

Reads and writes JSON, npz without pickle, and palette PNG; never unpickles.  Imports neither torch nor pipeline code.
Shapes: K foreground classes, C = K + 1 with background, n labels of one image, H W image pixels, h w map cells.
Sizes are always (height, width).
"""

from stages.contracts.attention import (
    AttentionRecord,
    attention_shards,
    iter_attention,
    read_attention_shard,
    write_attention_shard,
)
from stages.contracts.files import (
    read_json,
    read_model,
    write_atomic,
    write_json,
)
from stages.contracts.images import (
    IMAGE_FORMATS,
    LEAST_INPUT_PX,
    Box,
    ClassList,
    ImageIndex,
    ImageRecord,
    ImageSet,
    LabelledBox,
    eight_bits,
    open_image_set,
    read_rgb,
    upright,
)
from stages.contracts.masks import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    MASK_FORMATS,
    MASK_MODES,
    MAX_MASK_CLASSES,
    OBJECT_MASK_MODES,
    encode_index_mask,
    read_index_mask,
    voc_palette,
    write_index_mask,
)
from stages.contracts.running import (
    Part,
    Progress,
    Runtime,
    SilentProgress,
    StageConfig,
    StageResult,
    option_texts,
)

__all__ = [
    "BACKGROUND_INDEX",
    "IGNORE_INDEX",
    "IMAGE_FORMATS",
    "LEAST_INPUT_PX",
    "MASK_FORMATS",
    "MASK_MODES",
    "MAX_MASK_CLASSES",
    "OBJECT_MASK_MODES",
    "AttentionRecord",
    "Box",
    "ClassList",
    "ImageIndex",
    "ImageRecord",
    "ImageSet",
    "LabelledBox",
    "Part",
    "Progress",
    "Runtime",
    "SilentProgress",
    "StageConfig",
    "StageResult",
    "attention_shards",
    "eight_bits",
    "encode_index_mask",
    "iter_attention",
    "open_image_set",
    "option_texts",
    "read_attention_shard",
    "read_index_mask",
    "read_json",
    "read_model",
    "read_rgb",
    "upright",
    "voc_palette",
    "write_atomic",
    "write_attention_shard",
    "write_index_mask",
    "write_json",
]
