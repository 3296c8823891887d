"""Embeddings from data."""

from types import SimpleNamespace


def create_embedding_from_data(data, name, filename="unknown embedding file", filepath=None):
    vectors = next(iter(data["string_to_param"].values())) if "string_to_param" in data else next(iter(data.values()))
    return SimpleNamespace(name=name, vec=vectors, shape=vectors.shape[-1], filename=filename, shorthash="file")
