"""Semantic segmentation on Pascal VOC 2012 and VOC-layout folders: data, checks, model, training, evaluation, registry."""
