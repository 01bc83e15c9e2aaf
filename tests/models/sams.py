"""SAM and SAM 2, tiny, built from configs: real classes with random weights."""

from __future__ import annotations

import torch


def original(side: int = 128):
    """A `segment_anything.modeling.Sam` of about 80,000 parameters."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ImageEncoderViT(
            img_size=side, patch_size=16, embed_dim=32, depth=2, num_heads=2, window_size=4, global_attn_indexes=(1,),
            use_rel_pos=True, out_chans=32,
        )
        transformer = TwoWayTransformer(depth=1, embedding_dim=32, num_heads=2, mlp_dim=64)
        return Sam(
            encoder, PromptEncoder(32, (side // 16, side // 16), (side, side), mask_in_chans=4),
            MaskDecoder(transformer_dim=32, transformer=transformer),
        ).eval()


def huggingface(side: int = 128):
    """A transformers SamModel of the same size."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    vision = SamVisionConfig(
        hidden_size=32, output_channels=32, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=16,
        window_size=4, global_attn_indexes=[1], mlp_dim=64, num_pos_feats=16,
    )
    prompt = SamPromptEncoderConfig(hidden_size=32, image_size=side, patch_size=16, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=32, mlp_dim=64, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SamModel(
            SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
        ).eval()


def second(side: int = 128):
    """A transformers Sam2Model with a small Hiera."""
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    backbone = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[side, side], blocks_per_stage=[1, 2, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 2], global_attention_blocks=[4],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[side // 4] * 2, [side // 8] * 2, [side // 16] * 2],
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": side, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 32},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Sam2Model(config).eval()
