"""Masks to annotation tools and back: COCO, VOC's folder, Label Studio, CVAT."""
