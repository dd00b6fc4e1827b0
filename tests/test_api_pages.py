from pathlib import Path

from api_pages import write


def test_every_public_docstring_becomes_a_page_without_a_warning(tmp_path: Path) -> None:
    write(tmp_path)
    assert "A trained model, with its autoencoder and tokenizer" in (tmp_path / "calm_core" / "api.html").read_text()
    assert (tmp_path / "calm_core" / "model" / "heads" / "energy.html").is_file()
    for library in ("huggingface", "lm_eval"):
        assert (tmp_path / "calm_core" / "integrations" / f"{library}.html").is_file()
