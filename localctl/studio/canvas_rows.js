// One row per region: its phrase and strengths; and the start of the component.
const rows = make('div', { class: 'scene-rows' });
const shownRows = new Map(); // id -> { node, fields, mark }
const NUMBERS = {
  strength: ['Strength', 0, 3, 0.05, 'Factor of the method\'s own strength inside the region'],
  outside_strength: ['Outside', 0, 3, 0.05, 'Factor of the method\'s own strength outside the region (S\')'],
  start: ['Start', 0, 1, 0.05, 'Steered from this fraction of the steps'],
  end: ['End', 0, 1, 0.05, 'Steered up to this fraction of the steps'],
};

function change(id, name, value, quiet) {
  const region = regionOf(id);
  if (region && region[name] !== value) setRegion({ ...region, [name]: value }, quiet);
}

function textField(id, name, label, hint) {
  const input = make('input', {
    type: 'text', maxlength: LIMITS.text, placeholder: hint, class: `scene-text scene-${name}`, 'aria-label': label, spellcheck: 'false',
    oninput: () => change(id, name, input.value, true),
    onfocus: () => select(id),
    onkeydown: (event) => { if (event.key === 'Enter') stage.focus({ preventScroll: true }); },
  });
  return input;
}

function numberField(id, name) {
  const [label, min, max, step, title] = NUMBERS[name];
  const slider = make('input', {
    type: 'range', min, max, step, title, 'aria-label': label,
    oninput: () => { number.value = slider.value; change(id, name, Number(slider.value), true); },
  });
  const number = make('input', {
    type: 'number', min: -max, max: 10, step, title, 'aria-label': `${label}, number`,
    onchange: () => change(id, name, Number(number.value) || 0),
  });
  const node = make('label', { class: 'scene-number', title }, make('span', {}, label), slider, number);
  return { node, set: (value) => { for (const one of [slider, number]) if (document.activeElement !== one) one.value = value; } };
}

function select(id) {
  if (selected === id) return;
  selected = id;
  refresh();
}

function newRow(region) {
  const { id } = region;
  const fields = {
    phrase: textField(id, 'phrase', 'Phrase', 'words of the prompt'),
    prompt: textField(id, 'prompt', 'Own prompt', 'a description of this region alone, for space-time attention'),
    negative_prompt: textField(id, 'negative_prompt', 'Negative prompt', 'what to avoid in this region'),
  };
  const numbers = Object.fromEntries(Object.keys(NUMBERS).map((name) => [name, numberField(id, name)]));
  const occurrence = make('input', {
    type: 'number', min: 1, max: 20, step: 1, class: 'scene-occurrence', 'aria-label': 'Occurrence of the phrase',
    onchange: () => change(id, 'occurrence', clamp(Math.round(Number(occurrence.value) || 1), 1, 20) - 1),
  });
  const swatch = make('button', { type: 'button', class: 'scene-swatch', title: 'Select the region', onclick: () => { select(id); stage.focus({ preventScroll: true }); } });
  const mark = make('div', { class: 'scene-mark', role: 'status' });
  const more = make('details', { class: 'scene-more' }, make('summary', {}, 'more'),
    numbers.outside_strength.node, numbers.start.node, numbers.end.node,
    make('label', { class: 'scene-field' }, make('span', {}, 'Own prompt'), fields.prompt),
    make('label', { class: 'scene-field' }, make('span', {}, 'Negative'), fields.negative_prompt),
    make('label', { class: 'scene-field scene-short' }, make('span', {}, 'Occurrence'), occurrence));
  const remover = button('clear', 'Delete this region', () => removeRegion(id));
  const node = make('div', { class: 'scene-row', onclick: () => select(id) },
    make('div', { class: 'scene-line' }, swatch, fields.phrase, numbers.strength.node, remover), mark, more);
  return { node, fields, numbers, occurrence, swatch, mark };
}

function refreshRows() {
  if (!options.rows) return;
  const ids = new Set(scene.regions.map((region) => region.id));
  for (const [id, row] of shownRows) if (!ids.has(id)) { row.node.remove(); shownRows.delete(id); }
  scene.regions.forEach((region, index) => {
    if (!shownRows.has(region.id)) shownRows.set(region.id, newRow(region));
    const row = shownRows.get(region.id);
    if (rows.children[index] !== row.node) rows.insertBefore(row.node, rows.children[index] || null);
    fillRow(row, region, index);
  });
}

function fillRow(row, region, index) {
  row.node.classList.toggle('scene-selected', region.id === selected);
  row.node.style.setProperty('--region', colorOf(region));
  row.swatch.textContent = index + 1;
  row.swatch.style.color = textOn(colorOf(region));
  for (const [name, input] of Object.entries(row.fields)) {
    if (document.activeElement !== input) input.value = region[name] || '';
  }
  for (const [name, field] of Object.entries(row.numbers)) field.set(region[name]);
  if (document.activeElement !== row.occurrence) row.occurrence.value = region.occurrence + 1;
  const mark = (props.marks || {})[region.id];
  row.mark.className = `scene-mark${mark ? ` scene-mark-${mark.kind}` : ''}`;
  row.mark.textContent = mark ? mark.text : '';
  row.mark.hidden = !mark || !mark.text;
}

function focusPhrase(id) {
  const row = id && shownRows.get(id);
  if (row) row.fields.phrase.focus();
}

// ---- the start
element.querySelector('.scene').append(toolbar, frame, status, rows);
// Gradio takes a name in quotes for that of an event, so the watched ones stand in one text.
const [VALUE, MARKS, BACKGROUND, SHAPE] = 'value marks background shape'.split(' ');
watch(VALUE, () => {
  scene = sceneOf(props.value);
  past.length = future.length = 0;
  draft = null;
  if (!regionOf(selected)) selected = options.fixed && scene.regions.length ? scene.regions[0].id : null;
  refresh();
});
watch(MARKS, refreshRows);
watch(BACKGROUND, loadBackground);
// The server knows the size and the number of masks; what was painted since it was asked is kept.
watch(SHAPE, () => {
  const { width, height, regions } = props.shape || {};
  if (!regions) return;
  if (scene.width === width && scene.height === height && scene.regions.length === regions.length) return;
  scene = { width, height, regions: regions.map((region, index) => scene.regions[index] || { ...NEW_REGION, ...region }) };
  past.length = future.length = 0;
  if (!regionOf(selected)) selected = scene.regions[0].id;
  publish();
});
new ResizeObserver(paint).observe(frame);
new MutationObserver(paint).observe(document.body, { attributes: true, attributeFilter: ['class'] });
if (options.fixed && scene.regions.length) selected = scene.regions[0].id;
loadBackground();
refresh();
