"""Evaluation harnesses of others: what they load to find vispco, and no more, to stay light."""


def lmms_eval_models():
    """The manifest of the model `vispco`, which the entry-point group `lmms_eval.models` calls."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vispco", chat_class_path="vispco.integrations.lmms_eval.VispcoModel")
