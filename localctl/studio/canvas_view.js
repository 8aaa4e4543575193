// The canvas: what it shows, the pointer, the keyboard and the toolbar.
const HANDLE = 9; // pixels on the screen
const ICONS = {
  select: 'M5 3l14 8-6.2 1.6L10 19z',
  box: 'M4 6h16v12H4z',
  brush: 'M4 20c3 0 5-1.5 5-4l-2-2c-2.5 0-4 2-3 6zM9 13l9-9 2 2-9 9z',
  erase: 'M8 19h12M5 15l8-9 6 5-6 7H8z',
  undo: 'M9 6L4 11l5 5M4 11h9a6 6 0 016 6v1',
  redo: 'M15 6l5 5-5 5M20 11h-9a6 6 0 00-6 6v1',
  add: 'M12 5v14M5 12h14',
  clear: 'M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13',
};
const TOOL_NAMES = { select: 'Select (V)', box: 'Box (B)', brush: 'Brush (P)', erase: 'Eraser (E)' };

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  path.setAttribute('d', ICONS[name]);
  svg.append(path);
  return svg;
}

const button = (name, label, act) =>
  make('button', { type: 'button', class: 'scene-button', title: label, 'aria-label': label, onclick: act }, icon(name));

const stage = make('canvas', { class: 'scene-stage', tabindex: '0', role: 'application' });
const frame = make('div', { class: 'scene-frame' }, stage); // has the size, so that the canvas cannot change it
const status = make('div', { class: 'scene-status', role: 'status', 'aria-live': 'polite' });
const say = (text) => { status.textContent = text; };
const toolButtons = new Map(
  options.tools.map((name) => [name, button(name, TOOL_NAMES[name], () => chooseTool(name))]),
);
const undoButton = button('undo', 'Undo (Ctrl+Z)', undo);
const redoButton = button('redo', 'Redo (Ctrl+Shift+Z)', redo);
const addButton = button('add', 'Add a region (N)', addCentred);
const removeButton = button('clear', options.fixed ? 'Clear the mask (Delete)' : 'Delete the region (Delete)', remove);
const brushSize = make('input', {
  type: 'range', min: 1, max: 30, value: 6, class: 'scene-brush', title: 'Brush size ([ and ])', 'aria-label': 'Brush size',
  oninput: () => { brush = Number(brushSize.value) / 100; paint(); },
});
const sizeInput = (name) => make('input', {
  type: 'number', min: 64, max: 2048, step: 8, class: 'scene-size', title: `${name} in pixels`,
  'aria-label': `${name} in pixels`, onchange: () => resize(),
});
const sizes = { width: sizeInput('Width'), height: sizeInput('Height') };
const chooser = make('span', { class: 'scene-chooser', role: 'group', 'aria-label': 'Mask to paint' });
const toolbar = make('div', { class: 'scene-toolbar', role: 'toolbar', 'aria-label': 'Tools of the canvas' },
  make('span', { class: 'scene-group' }, ...toolButtons.values()), brushSize,
  make('span', { class: 'scene-group' }, undoButton, redoButton),
  make('span', { class: 'scene-group' }, options.fixed ? null : addButton, removeButton),
  options.fixed ? chooser : null,
  make('span', { class: 'scene-sizes' }, sizes.width, make('span', {}, '×'), sizes.height));
if (options.size === false) toolbar.lastChild.hidden = true;

// With fixed regions: a button for each, which chooses whose mask is painted.
function refreshChooser() {
  if (!options.fixed) return;
  chooser.hidden = scene.regions.length < 2;
  chooser.replaceChildren(...scene.regions.map((region, index) => {
    const pressed = String(region.id === selected);
    const act = () => { selected = region.id; refresh(); };
    const text = `${index + 1} ${region.phrase}`;
    const node = make('button', { type: 'button', class: 'scene-choice', 'aria-pressed': pressed, onclick: act }, text);
    node.style.setProperty('--region', colorOf(region));
    return node;
  }));
}

function chooseTool(name) {
  if (!options.tools.includes(name)) return;
  tool = name;
  stage.focus({ preventScroll: true });
  refresh();
}

function resize() {
  const read = (name) => clamp(Math.round(Number(sizes[name].value || scene[name]) / 8) * 8, 64, 2048);
  commit({ ...scene, width: read('width'), height: read('height') });
}

function addCentred() {
  const shift = 0.03 * (scene.regions.length % 5);
  setRegion(newRegion({ box: [0.3 + shift, 0.3 + shift, 0.6 + shift, 0.6 + shift] }));
  focusPhrase(selected);
}

function remove() {
  if (!selected) return;
  if (options.fixed) clearRegion(selected);
  else removeRegion(selected);
}

// ---- painting the canvas
let background = null;
function loadBackground() {
  background = null;
  if (typeof props.background === 'string' && props.background) {
    const image = new Image();
    image.onload = () => { background = image; paint(); };
    image.src = props.background;
  }
  paint();
}

function paintBackground(context, width, height) {
  const dark = document.body.classList.contains('dark');
  context.fillStyle = dark ? '#2b2a28' : '#fbfaf8';
  context.fillRect(0, 0, width, height);
  if (background) { // covers the canvas, as the image is scaled and cropped
    const scale = Math.max(width / background.width, height / background.height);
    const [w, h] = [background.width * scale, background.height * scale];
    context.drawImage(background, (width - w) / 2, (height - h) / 2, w, h);
    return;
  }
  context.strokeStyle = dark ? '#3a3835' : '#eae7e0';
  context.lineWidth = 1;
  for (let i = 1; i < 8; i += 1) {
    context.beginPath();
    context.moveTo(Math.round((i * width) / 8) + 0.5, 0);
    context.lineTo(Math.round((i * width) / 8) + 0.5, height);
    context.moveTo(0, Math.round((i * height) / 8) + 0.5);
    context.lineTo(width, Math.round((i * height) / 8) + 0.5);
    context.stroke();
  }
  if (!shownRegions().some(boxOf)) {
    context.fillStyle = getComputedStyle(element).getPropertyValue('--body-text-color-subdued');
    context.font = '15px system-ui, sans-serif';
    context.textAlign = 'center';
    const hint = options.hint || 'Drag to place a region';
    const lines = context.measureText(hint).width > width - 20 ? hint.split(/(?<=,) /) : [hint];
    lines.forEach((line, index) => context.fillText(line, width / 2, height / 2 + 22 * (index - (lines.length - 1) / 2)));
    context.textAlign = 'left';
  }
}

function tinted(mask, color, width, height) {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext('2d');
  context.drawImage(mask, 0, 0, width, height);
  context.globalCompositeOperation = 'source-in';
  context.fillStyle = color;
  context.fillRect(0, 0, width, height);
  return canvas;
}

function paintRegion(context, region, width, height) {
  const color = colorOf(region);
  const active = region.id === selected;
  const strokes = stroke && stroke.id === region.id ? stroke.canvas : null;
  const mask = strokes || (region.mask && maskOf(region.mask)?.canvas);
  if (mask) {
    const shape = tinted(mask, color, width, height);
    context.globalAlpha = active ? 0.62 : 0.45;
    context.drawImage(shape, 0, 0);
    context.globalAlpha = 1;
  }
  const box = strokes ? null : boxOf(region);
  if (!box) return;
  const [x, y] = [box[0] * width, box[1] * height];
  const [w, h] = [(box[2] - box[0]) * width, (box[3] - box[1]) * height];
  if (region.box) {
    context.globalAlpha = active ? 0.34 : 0.22;
    context.fillStyle = color;
    context.fillRect(x, y, w, h);
    context.globalAlpha = 1;
  }
  if (region.box || active) {
    context.setLineDash(region.box ? [] : [5, 4]);
    context.strokeStyle = 'rgba(255,255,255,.75)';
    context.lineWidth = active ? 5 : 4;
    context.strokeRect(x, y, w, h);
    context.strokeStyle = color;
    context.lineWidth = active ? 3 : 2;
    context.strokeRect(x, y, w, h);
    context.setLineDash([]);
  }
  paintLabel(context, region, color, x, y, width);
  if (active && !options.fixed) for (const [hx, hy] of handles(box)) paintHandle(context, color, hx * width, hy * height);
}

function paintLabel(context, region, color, x, y, width) {
  const text = region.phrase ? `${numberOf(region)}  ${region.phrase}` : `${numberOf(region)}`;
  context.font = '600 12px system-ui, sans-serif';
  const cut = text.length > 34 ? `${text.slice(0, 33)}…` : text;
  const length = context.measureText(cut).width + 12;
  const left = clamp(x, 0, Math.max(0, width - length));
  const top = y >= 20 ? y - 20 : y;
  context.fillStyle = color;
  context.fillRect(left, top, length, 20);
  context.fillStyle = textOn(color);
  context.fillText(cut, left + 6, top + 14);
}

function textOn(color) {
  const [r, g, b] = [1, 3, 5].map((i) => (parseInt(color.slice(i, i + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? '#111' : '#fff';
}

function paintHandle(context, color, x, y) {
  context.fillStyle = '#fff';
  context.strokeStyle = color;
  context.lineWidth = 2;
  context.beginPath();
  context.rect(x - HANDLE / 2, y - HANDLE / 2, HANDLE, HANDLE);
  context.fill();
  context.stroke();
}

function paint() {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [stage.clientWidth, stage.clientHeight];
  if (!width || !height) return;
  if (stage.width !== Math.round(width * ratio) || stage.height !== Math.round(height * ratio)) {
    [stage.width, stage.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  }
  const context = stage.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  paintBackground(context, width, height);
  const regions = shownRegions();
  for (const region of regions) if (region.id !== selected) paintRegion(context, region, width, height);
  for (const region of regions) if (region.id === selected) paintRegion(context, region, width, height);
  if (hover && (tool === 'brush' || tool === 'erase')) {
    context.strokeStyle = '#111';
    context.lineWidth = 1.5;
    context.beginPath();
    context.arc(hover[0] * width, hover[1] * height, (brush / 2) * Math.max(width, height), 0, 7);
    context.stroke();
  }
}

function refresh() {
  frame.style.aspectRatio = `${scene.width} / ${scene.height}`;
  frame.style.maxWidth = `calc(72vh * ${scene.width / scene.height})`;
  stage.style.cursor = tool === 'select' ? 'default' : 'crosshair';
  for (const [name, node] of toolButtons) node.setAttribute('aria-pressed', String(name === tool));
  brushSize.hidden = tool !== 'brush' && tool !== 'erase';
  [undoButton.disabled, redoButton.disabled, removeButton.disabled] = [!past.length, !future.length, !selected];
  for (const name of ['width', 'height']) if (document.activeElement !== sizes[name]) sizes[name].value = scene[name];
  stage.setAttribute('aria-label', `Canvas with ${scene.regions.length} regions`);
  paint();
  refreshRows();
  refreshChooser();
}
