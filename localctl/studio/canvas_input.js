// The pointer and the keyboard on the canvas.
let hover = null; // where the pointer is, (x, y) in [0, 1]
let drag = null; // what a pressed pointer does: { kind, start, region, box, handle }
let stroke = null; // what the brush has painted so far: { id, canvas, last }

const handles = ([left, top, right, bottom]) => [[left, top], [right, top], [right, bottom], [left, bottom]];

function pointOf(event) {
  const frame = stage.getBoundingClientRect();
  return [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
}

function handleAt([x, y]) {
  const region = regionOf(selected);
  const box = region && boxOf(region);
  if (!box || options.fixed) return -1;
  const reach = [HANDLE * 1.4 / stage.clientWidth, HANDLE * 1.4 / stage.clientHeight];
  return handles(box).findIndex(([hx, hy]) => Math.abs(hx - x) < reach[0] && Math.abs(hy - y) < reach[1]);
}

function covers(region, [x, y]) {
  const box = boxOf(region);
  if (!box || x < box[0] || x > box[2] || y < box[1] || y > box[3]) return false;
  if (region.box) return true;
  const { canvas } = maskOf(region.mask);
  const [px, py] = [Math.min(canvas.width - 1, Math.floor(x * canvas.width)), Math.min(canvas.height - 1, Math.floor(y * canvas.height))];
  return canvas.getContext('2d').getImageData(px, py, 1, 1).data[3] > 32;
}

function regionAt(point) {
  const area = (region) => { const box = boxOf(region); return (box[2] - box[0]) * (box[3] - box[1]); };
  const found = scene.regions.filter((region) => covers(region, point)).sort((a, b) => area(a) - area(b));
  return found[0] || null;
}

function press(event) {
  if (event.button > 0) return;
  stage.focus({ preventScroll: true });
  stage.setPointerCapture(event.pointerId);
  const start = pointOf(event).map((value) => clamp(value, 0, 1));
  if (tool === 'brush' || tool === 'erase') {
    beginStroke(start);
    return;
  }
  const handle = handleAt(start);
  const current = regionOf(selected);
  if (handle >= 0) drag = { kind: 'resize', start, region: current, box: boxOf(current), handle };
  else if (tool === 'select') {
    const region = regionAt(start);
    selected = region ? region.id : null;
    drag = region && { kind: 'move', start, region, box: boxOf(region) };
  } else if (current && !options.fixed && !event.shiftKey && covers(current, start)) {
    drag = { kind: 'move', start, region: current, box: boxOf(current) };
  } else drag = { kind: 'box', start, region: options.fixed ? { ...(current || scene.regions[0]), mask: null } : newRegion({}), box: null };
  refresh();
}

function move(event) {
  hover = pointOf(event);
  if (stroke) {
    continueStroke(hover);
    return;
  }
  if (!drag) {
    if (tool === 'brush' || tool === 'erase') paint();
    else stage.style.cursor = handleAt(hover) >= 0 ? 'nwse-resize' : tool === 'select' && regionAt(hover) ? 'move' : tool === 'select' ? 'default' : 'crosshair';
    return;
  }
  const [x, y] = hover.map((value) => clamp(value, 0, 1));
  if (drag.kind === 'box') {
    const box = [Math.min(x, drag.start[0]), Math.min(y, drag.start[1]), Math.max(x, drag.start[0]), Math.max(y, drag.start[1])];
    drag.box = isLarge(box) ? box : null;
    draft = drag.box && { ...drag.region, box };
  } else if (drag.kind === 'move') {
    drag.to = shifted(drag.box, hover[0] - drag.start[0], hover[1] - drag.start[1]);
    draft = drag.region.box ? placed(drag.region, drag.box, drag.to) : null;
  } else {
    drag.to = resized(drag.box, drag.handle, x, y);
    draft = drag.region.box && isLarge(drag.to) ? placed(drag.region, drag.box, drag.to) : null;
  }
  paint();
}

function release(event) {
  if (stroke) {
    endStroke();
    return;
  }
  const done = drag;
  drag = null;
  if (!done) return;
  const point = pointOf(event);
  if (done.kind === 'box' && done.box) setRegion({ ...done.region, box: rounded(done.box) });
  else if (done.kind === 'box') {
    const region = regionAt(point);
    selected = region ? region.id : null;
    draft = null;
    refresh();
  } else if (done.to && isLarge(done.to) && done.to.some((value, index) => Math.abs(value - done.box[index]) > 1e-4)) {
    setRegion(placed(done.region, done.box, rounded(done.to)));
  } else {
    draft = null;
    if (done.kind === 'move' && tool === 'box') selected = regionAt(point)?.id ?? selected;
    refresh();
  }
}

const isLarge = (box) => (box[2] - box[0]) * stage.clientWidth > 5 && (box[3] - box[1]) * stage.clientHeight > 5;
const rounded = (box) => box.map((value) => Math.round(clamp(value, 0, 1) * 10000) / 10000);

function shifted([left, top, right, bottom], dx, dy) {
  const x = clamp(dx, -left, 1 - right);
  const y = clamp(dy, -top, 1 - bottom);
  return [left + x, top + y, right + x, bottom + y];
}

function resized([left, top, right, bottom], handle, x, y) {
  const [ax, ay] = [[right, bottom], [left, bottom], [left, top], [right, top]][handle]; // the corner that stays
  return [Math.min(x, ax), Math.min(y, ay), Math.max(x, ax), Math.max(y, ay)];
}

// ---- the brush
function beginStroke(point) {
  let region = regionOf(selected);
  if (!region && tool === 'erase') region = regionAt(point);
  if (!region && tool === 'brush' && !options.fixed) region = newRegion({});
  if (!region && options.fixed) [region] = scene.regions;
  if (!region) return;
  selected = region.id;
  draft = region;
  stroke = { id: region.id, region, canvas: paintable(region), last: point };
  continueStroke(point);
}

function continueStroke(point) {
  const { canvas, last } = stroke;
  const context = canvas.getContext('2d');
  context.globalCompositeOperation = tool === 'erase' ? 'destination-out' : 'source-over';
  context.strokeStyle = context.fillStyle = '#fff';
  context.lineCap = context.lineJoin = 'round';
  context.lineWidth = Math.max(1, brush * Math.max(canvas.width, canvas.height));
  context.beginPath();
  context.moveTo(last[0] * canvas.width, last[1] * canvas.height);
  context.lineTo(point[0] * canvas.width + 0.01, point[1] * canvas.height);
  context.stroke();
  stroke.last = point;
  paint();
}

function endStroke() {
  const { region, canvas } = stroke;
  stroke = null;
  draft = null;
  if (boxAround(canvas)) setRegion({ ...region, box: null, mask: urlOf(canvas) });
  else if (options.fixed) clearRegion(region.id);
  else removeRegion(region.id);
}

// ---- the keyboard
const TOOL_KEYS = { v: 'select', b: 'box', p: 'brush', e: 'erase' };

function key(event) {
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (name !== 'z' && name !== 'y') return;
    if (name === 'y' || event.shiftKey) redo();
    else undo();
  } else if (TOOL_KEYS[name]) chooseTool(TOOL_KEYS[name]);
  else if (name === 'Delete' || name === 'Backspace') remove();
  else if (name === 'n' && !options.fixed) addCentred();
  else if (name === 'Escape') { selected = null; refresh(); }
  else if (name === 'Enter') focusPhrase(selected);
  else if (name === '[' || name === ']') {
    brush = clamp(brush + (name === ']' ? 0.01 : -0.01), 0.01, 0.3);
    brushSize.value = Math.round(brush * 100);
    paint();
  } else if (/^[1-9]$/.test(name)) { selected = scene.regions[Number(name) - 1]?.id ?? selected; refresh(); }
  else if (!arrow(event)) return;
  event.preventDefault();
}

function arrow(event) {
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const region = regionOf(selected);
  const box = region && boxOf(region);
  if (!ways[event.key] || !box || options.fixed) return false;
  const [dx, dy] = ways[event.key].map((value) => value * (event.shiftKey ? 0.05 : 0.01));
  const to = event.altKey
    ? [box[0], box[1], clamp(box[2] + dx, box[0] + 0.02, 1), clamp(box[3] + dy, box[1] + 0.02, 1)]
    : shifted(box, dx, dy);
  setRegion(placed(region, box, rounded(to)), true);
  return true;
}

stage.addEventListener('pointerdown', press);
stage.addEventListener('pointermove', move);
stage.addEventListener('pointerup', release);
stage.addEventListener('pointercancel', () => { drag = stroke = draft = null; refresh(); });
stage.addEventListener('pointerleave', () => { hover = null; paint(); });
stage.addEventListener('keydown', key);
