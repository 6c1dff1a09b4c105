"""A page of HTML taken apart, for tests of what it shows."""

from html.parser import HTMLParser

VOID = {"br", "meta", "img"}


class Page(HTMLParser):
    """The tags and the text of a piece of HTML; `of` refuses tags that are not closed in order."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.starts, self.open, self.text = [], [], ""

    @classmethod
    def of(cls, html):
        page = cls()
        page.feed(html)
        page.close()
        assert page.open == []
        return page

    @property
    def tags(self):
        return {tag for tag, _ in self.starts}

    def handle_starttag(self, tag, attributes):
        self.starts.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
