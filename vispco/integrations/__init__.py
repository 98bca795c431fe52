"""Other people's evaluation harnesses: what they load to find vispco, and nothing else, so that it stays light."""


def lmms_eval_models():
    """What the entry-point group `lmms_eval.models` calls: the manifest of the model `vispco`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vispco", chat_class_path="vispco.integrations.lmms_eval.VispcoModel")
