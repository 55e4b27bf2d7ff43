"""Semantic segmentation on Pascal VOC 2012 and VOC-layout folders: from photos and masks to a registered model."""
