"""Model cards of converted weights."""

from timm_tresnet.recipes import Recipe


def make_card(recipe: Recipe | None, architecture: str, num_classes: int, repo_id: str | None = None) -> str:
    """Write the model card of a converted checkpoint.

    Args:
        recipe: what is known about the weights, if anything.
        architecture: name of the variant.
        num_classes: number of classes; 0 for a backbone.
        repo_id: Hub repository that the card is for.

    Returns:
        Markdown, with the Hub's metadata on top.
    """
    metadata = ["library_name: timm", "tags: [timm, image-classification]"]
    lines = [f"# {recipe.name if recipe else architecture}", "", f"TResNet with {num_classes or 'no'} classes."]
    if recipe:
        if recipe.license:
            metadata.append(f"license: {recipe.license}")
        metric = recipe.metric
        lines += [
            f"Trained on {recipe.dataset}; {metric.name} {metric.value} ({metric.published}).",
            f"Paper: {recipe.paper}. Code: {recipe.code}.",
        ]
    source = f"hf-hub:{repo_id}" if repo_id else "local-dir:FOLDER"
    lines += ["", "```python", "import timm", "", f'model = timm.create_model("{source}", pretrained=True)', "```"]
    return "\n".join(["---", *metadata, "---", "", *lines, ""])
