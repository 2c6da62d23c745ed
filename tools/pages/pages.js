'use strict';
const root = document.documentElement;
const field = document.getElementById('search'), found = document.getElementById('found');

// Light or dark: the reader's choice is kept, and without one the system's holds.
document.getElementById('theme').onclick = () => {
  const dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  root.dataset.theme = dark ? 'light' : 'dark';
  try { localStorage.theme = root.dataset.theme; } catch { /* the choice holds for this page */ }
};

// The contents are closed where they would stand above the text.
const contents = document.getElementById('contents'), wide = matchMedia('(min-width: 60rem)');
const fit = () => { contents.open = wide.matches; };
wide.onchange = fit;
fit();
document.querySelector('.current').scrollIntoView({ block: 'nearest' });

// Search: search.js is read when it is first needed.
let loading;
const loaded = () => loading ??= new Promise(done => {
  const script = document.createElement('script');
  script.src = 'search.js';
  script.onload = done;
  document.head.append(script);
});

// Every word must occur in the section or in the name of its chapter; a word in the title counts most.
function rank([page, , title, text], words) {
  const chapter = book.pages[page][1].toLowerCase(), heading = title.toLowerCase(), prose = text.toLowerCase();
  let sum = 0;
  for (const word of words) {
    const score = 20 * (heading === word) + 10 * heading.includes(word) + 3 * chapter.includes(word)
      + Math.min(prose.split(word).length - 1, 5);
    if (!score) return 0;
    sum += score;
  }
  return sum;
}

function make(tag, ...parts) {
  const element = document.createElement(tag);
  element.append(...parts);
  return element;
}

// The text around the first of the words, which are marked.
function excerpt(text, words) {
  const places = words.map(word => text.toLowerCase().indexOf(word)).filter(place => place >= 0);
  const start = text.lastIndexOf(' ', Math.min(...places, text.length) - 60) + 1, end = text.indexOf(' ', start + 220);
  const piece = (start ? '… ' : '') + (end < 0 ? text.slice(start) : `${text.slice(start, end)} …`);
  const pattern = new RegExp(`(${words.map(word => word.replace(/[^\p{L}\p{N}\s]/gu, '\\$&')).join('|')})`, 'i');
  return make('p', ...piece.split(pattern).map((part, i) => i % 2 ? make('mark', part) : part));
}

async function search() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  found.hidden = !words.length;
  document.querySelector('article').hidden = words.length > 0;
  if (!words.length) return;
  await loaded();
  const hits = book.sections.map(section => [rank(section, words), section]).filter(([score]) => score);
  hits.sort(([a], [b]) => b - a);
  const list = make('ol');
  for (const [, [page, anchor, title, text]] of hits.slice(0, 40)) {
    const [name, chapter] = book.pages[page];
    const link = make('a', title && title !== chapter ? `${chapter}: ${title}` : chapter);
    link.href = `${name}.html#${encodeURIComponent(anchor)}`;
    link.onclick = () => { field.value = ''; search(); };
    list.append(make('li', link, excerpt(text, words)));
  }
  const shown = hits.length > 40 ? ', the first 40 are shown' : '';
  found.replaceChildren(make('h1', `${hits.length} places${shown}`), list);
}

field.oninput = search;
field.form.onsubmit = event => { event.preventDefault(); search(); };
field.value = new URLSearchParams(location.search).get('q') ?? '';
if (field.value) search();
