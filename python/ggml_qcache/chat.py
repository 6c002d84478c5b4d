"""Chat messages with images to a prompt of text and images, through the model's own chat template.

Templates of LLaVA-family checkpoints write ``<image>`` where an image goes; it is rendered so, as in training, and
then replaced by the image. Templates that know no images get a marker in the text of the message instead.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Optional

from llama_cpp.llama_chat_format import ChatFormatterResponse, Jinja2ChatFormatter

from .images import ImageLoader, LoadedImage

# the form LLaVA-1.5 was trained with, for files without a template
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {% elif message.role == 'assistant' %}ASSISTANT: {% endif %}"
    "{% for part in message.content or [] if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content or [] if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{{ eos_token if message.role == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

_PLACEHOLDER = "<image>"


class MediaPrompt:
    """A prompt of text and images, in order.

    llama_cpp's chat handlers encode the prompt that a formatter gives and hand it to ``Llama.tokenize``; this passes
    through ``encode`` whole.
    """

    def __init__(self, parts: Sequence[str | LoadedImage]) -> None:
        self.parts = list(parts)

    def encode(self, _encoding: str) -> MediaPrompt:
        """Returns itself."""
        return self


def has_images(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether any message has an image part."""
    return any(
        isinstance(part, dict) and part.get("type") in ("image_url", "image")
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


class ChatTemplate:
    """A chat formatter of llama_cpp that places images."""

    def __init__(
        self,
        template: str,
        *,
        bos_token: str,
        eos_token: str,
        eos_token_id: int,
        adds_bos: bool,
        loader: Optional[ImageLoader],
    ) -> None:
        """Compiles a template and finds out which forms of content it takes.

        Args:
            template: Jinja text.
            bos_token: Text of the BOS token.
            eos_token: Text of the EOS token; generation stops there.
            eos_token_id: Its id.
            adds_bos: Whether the vocabulary wants prompts to begin with BOS.
            loader: Loads the images; None: the model takes none.

        Raises:
            ValueError: The template is no valid Jinja.
        """
        try:
            self._render = Jinja2ChatFormatter(template, eos_token, bos_token, stop_token_ids=[eos_token_id])
        except Exception as error:
            raise ValueError(f"the chat template can't be compiled: {error}") from error
        self._bos_token = bos_token if adds_bos else ""
        self._loader = loader
        text = secrets.token_hex(8)
        listed = self._probe([{"type": "text", "text": text}])
        self._takes_text = text in self._probe(text)
        # a template that takes strings alone prints the list as Python or JSON would
        self._takes_parts = text in listed and f"'{text}'" not in listed and f'"{text}"' not in listed
        with_image = self._probe([{"type": "image"}, {"type": "text", "text": text}]) if self._takes_parts else ""
        self._takes_images = with_image.count(_PLACEHOLDER) == 1 and text in with_image

    def __call__(self, *, messages: Sequence[dict[str, Any]], **kwargs: Any) -> ChatFormatterResponse:
        """Renders messages.

        Args:
            messages: OpenAI's chat messages. An image part is ``{"type": "image_url", "image_url": URL or {"url":
                URL}}`` with anything that ``ImageLoader.load`` takes for URL.
            **kwargs: Passed to the template (tools, functions).

        Raises:
            ValueError: An image can't be loaded, the model takes none, the template refuses the messages or has no
                place for an image, or a part is of an unknown kind.
        """
        nonce = secrets.token_hex(8)
        placeholder = _PLACEHOLDER if self._takes_images else f"<image-{nonce}>"
        images: list[LoadedImage] = []
        # whoever writes "<image>" in a text means the text
        quoted = f"<{nonce}>"
        converted = [self._convert(message, images, placeholder, quoted) for message in messages]
        response = self._render(messages=converted, **kwargs)
        texts = response.prompt.split(placeholder) if images else [response.prompt]
        if len(texts) != len(images) + 1:
            raise ValueError(f"the chat template has places for {len(texts) - 1} of {len(images)} images")
        texts = [text.replace(quoted, _PLACEHOLDER) for text in texts]
        parts: list[str | LoadedImage] = [texts[0]]
        for image, text in zip(images, texts[1:]):
            parts += [image, text]
        return ChatFormatterResponse(
            prompt=MediaPrompt([part for part in parts if part != ""]) if images else texts[0],
            stop=[stop for stop in response.stop if stop],
            stopping_criteria=response.stopping_criteria,
            added_special=not self._bos_token or texts[0].startswith(self._bos_token),
        )

    def _probe(self, content: Any) -> str:
        """Renders one user message; empty where the template refuses it."""
        try:
            return self._render(messages=[{"role": "user", "content": content}]).prompt
        except Exception:  # whatever Jinja or the template's own checks raise
            return ""

    def _convert(
        self, message: dict[str, Any], images: list[LoadedImage], placeholder: str, quoted: str
    ) -> dict[str, Any]:
        """Brings a message to the form that the template takes, and loads its images."""
        content = message.get("content")
        if isinstance(content, str):
            content = content.replace(_PLACEHOLDER, quoted)
            if not self._takes_text and self._takes_parts:
                content = [{"type": "text", "text": content}]
        elif content is not None:
            parts = [self._part(part, images, quoted) for part in content]
            if self._takes_images or (self._takes_parts and all("text" in part for part in parts)):
                content = parts
            else:
                # as LLaVA has it, text follows an image on a line of its own
                content = "\n".join(part.get("text", placeholder) for part in parts)
                if not self._takes_text:
                    content = [{"type": "text", "text": content}]
        return {**message, "content": content}

    def _part(self, part: Any, images: list[LoadedImage], quoted: str) -> dict[str, str]:
        """Gives a content part as templates know it, and loads its image."""
        if isinstance(part, str):
            return {"type": "text", "text": part.replace(_PLACEHOLDER, quoted)}
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"].replace(_PLACEHOLDER, quoted)}
        if kind not in ("image_url", "image") or kind not in part:
            hint = "; video isn't supported" if str(kind).startswith("video") else ""
            raise ValueError(f"a content part is text or image_url with a value, not {kind!r}{hint}")
        source = part[kind]
        if isinstance(source, dict):
            if "url" not in source:
                raise ValueError(f"an image_url part has no url but {', '.join(map(repr, source)) or 'nothing'}")
            source = source["url"]
        if self._loader is None:
            raise ValueError("a message has an image, but the model was loaded without mmproj_path")
        images.append(self._loader.load(source))
        return {"type": "image"}
