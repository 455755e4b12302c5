/* OpsMantik's tracker.
 *   <script src="https://HOST/tracker.js" data-site="PUBLIC_ID" async></script>
 *   opsmantik.track(category, action, label?, value?, meta?), .session(), .flush()
 * An event has its id from the start and stays in the outbox until the server has answered for it.
 */
((ask) => ask(() => {
  const { dataset, src } = document.currentScript;
  const { site, api = new URL('/api/sync', src).href } = dataset;
  if (!site || window.opsmantik) return;
  const safe = (f) => (...a) => ask(() => f(...a));
  const now = Date.now;

  // A key an event: tabs would overwrite a list. Memory for what storage refuses.
  const home = 'om:' + site + ':', SESSION = home + 's', TURN = home + 't';
  const OUT = home + 'q:'; // rank:time:id, dropped from the lowest
  const BAD = home + 'x:'; // refused
  const HELD = home + 'w:'; // refused with its site: until that is let in
  const box = ask(() => Object.keys(localStorage) && localStorage) || {}, memory = {};
  const get = (k) => box[k] || memory[k];
  const set = (k, v) => { if (!ask(() => (box[k] = v))) memory[k] = v; };
  const del = (k) => { delete box[k]; delete memory[k]; };
  const list = (prefix) => Object.keys({ ...memory, ...box }).filter((k) => k.startsWith(prefix)).sort();
  const put = (prefix, key, text) => {
    if (text) set(prefix + key, text);
    const keys = list(prefix), most = prefix === BAD ? 20 : 500;
    while (keys.length > most || body(keys).length > 1e6) del(keys.shift());
  };
  const move = (k, to) => { put(to, k.slice(OUT.length), get(k)); del(k); };

  // UUIDv7. randomUUID is for https only; a blob's address ends in one, too.
  const uuid = () => (now() + 2 ** 48).toString(16).slice(1).replace(/.{4}$/, '-$&-7') +
    (ask(() => crypto.randomUUID()) || URL.createObjectURL(new Blob())).slice(-21);

  // one for all tabs, kept alive by the visitor
  const alive = (s) => Math.abs(now() - s.t) < 18e5;
  const session = (active) => {
    let s = ask(() => JSON.parse(get(SESSION)));
    if (!s || active && !alive(s)) {
      const t = now();
      s = { sid: uuid(), sm: new Date(t).toISOString().slice(0, 8) + '01', start: t, t, ids: {} };
    }
    if (active) {
      s.t = now();
      location.href.replace(/[?&#](gclid|[wg]braid|gclsrc|dclid|fbclid|ttclid|msclkid)=([^?&#]+)/gi,
        (all, k, v) => { s.ids[k.toLowerCase()] = new URLSearchParams('v=' + v).get('v'); });
    }
    set(SESSION, JSON.stringify(s));
    return s;
  };

  const traits = ask(() => {
    const { width: sw, height: sh } = screen;
    const { language: lan, deviceMemory: mem, hardwareConcurrency: con } = navigator;
    const timezone = Intl.DateTimeFormat().resolvedOptions().timeZone;
    // folded, never to be unfolded, nor joined across sites
    const text = [site, lan, mem, con, timezone, sw * sh, navigator.languages, navigator.maxTouchPoints,
      navigator.userAgent.replace(/[\d.]+/g, '')].join();
    const h = [1, 2, 3, 4];
    for (let i = 0; i < text.length * 4 + 256; i++) {
      h[i & 3] = Math.imul(h[i & 3] ^ h[i + 1 & 3] >>> 13 ^ text.charCodeAt(i >> 2), 0x9e3779b1);
    }
    return { fp: h.map((n) => (n >>> 0).toString(36)).join(''), lan, mem, con, sw, sh, timezone,
      dpr: devicePixelRatio, con_type: (navigator.connection || {}).effectiveType };
  });

  const flying = {}, beaconed = {}, alone = {};
  let timer, busy, failures = 0;
  const later = (wait, instead) => {
    if (instead) timer = clearTimeout(timer);
    timer = timer || setTimeout(safe(pump), wait);
  };
  const flush = () => later(0, 1);
  const body = (keys) => '{"events":[' + keys.map(get) + ']}';
  // 16,000 characters: below 64 KiB and 100 events
  const batch = (skip) => {
    const keys = [];
    for (const k of list(OUT).reverse()) {
      if (now() - parseInt(k.slice(OUT.length + 2), 36) > 20 * 864e5) move(k, BAD);
      else if (!skip[k]) {
        if (keys[0] && (alone[k] || alone[keys[0]] || body([...keys, k]).length > 16e3)) break;
        keys.push(k);
      }
    }
    return keys;
  };

  const post = async (keys, keepalive) => {
    let again = 1, wait = 0;
    keys.forEach((k) => { flying[k] = 1; });
    try {
      const answer = await fetch(api, { method: 'POST', body: body(keys), credentials: 'omit', keepalive,
        signal: ask(() => AbortSignal.timeout(2e4)) });
      const { ok, status } = answer, said = ok && (await answer.json()).results.map((r) => r.status);
      if (ok || /^4(?!08|29)/.test(status)) {
        again = 0;
        keys.forEach((k, i) => {
          const verdict = ok && said[i];
          if (/stored|duplicate|queued/.test(verdict)) {
            del(k);
            list(HELD).slice(-2).forEach((x) => move(x, OUT)); // all at once are slow
          } else if (ok && verdict !== 'rejected') again = 1;
          else if (/40[134]/.test(status)) move(k, HELD);
          else if (ok || !keys[1]) move(k, BAD);
          else alone[k] = 1; // one of them is bad: which?
        });
      } else wait = Math.min(answer.headers.get('Retry-After') * 1e3 || 0, 36e5);
    } catch (e) {}
    keys.forEach((k) => { delete flying[k]; });
    failures = again && failures + 1;
    set(TURN, now() + wait);
    later(again && wait + Math.random() * Math.min(6e4, 1e3 * 2 ** failures), 1);
  };

  // one tab at a time
  const pump = () => {
    timer = 0;
    const keys = batch(flying), wait = get(TURN) - now();
    if (busy || !keys[0]) return;
    if (wait > 0 && wait < 4e6) return later(wait);
    set(TURN, now() + 5e3);
    busy = 1;
    post(keys).then(() => { busy = 0; });
  };

  // no answer: they stay
  const leave = () => {
    const keys = batch(beaconed);
    if (busy) del(TURN);
    if (keys[0] && navigator.sendBeacon(api, body(keys))) keys.forEach((k) => { beaconed[k] = 1; });
  };

  let ended;
  const track = (ec, ea, el, ev, meta) => {
    const ts = now(), id = uuid(), call = ec === 'conversion', { sid, sm, ids } = session(ec !== 'system');
    const key = (call ? 2 : /beat|scroll/.test(ea) ? 0 : 1) + ':' + ts.toString(36) + ':' + id;
    put(OUT, key, JSON.stringify({
      id, s: site, u: location.href.slice(0, 4096), sid, sm, ec, ea, el, ev, r: document.referrer, ts,
      meta: { ...meta, ...traits, ...ids, ...call && { intent_stamp: ts, intent_action: ea } },
    }));
    ended = 0;
    // waits for nothing: the page may leave
    if (call) post([OUT + key], true);
    else later(0);
  };

  const on = (types, f) => types.split(' ').forEach((type) => addEventListener(type, safe(f), true));
  const find = (e, test) => e.composedPath().find((n) => n.getAttribute && test(n));
  const calls = (n) => {
    const href = (n.getAttribute('href') || '').trim();
    if (/^tel:/i.test(href)) return ['phone_call', 'tel:' + href.slice(4)];
    const [, , number = ''] = /(phone=|wa\.me\/)([^?&#/]*)/i.exec(href) || [];
    if (/^(whatsapp:|(https?:)?\/\/(wa\.me|(api|web)\.whatsapp\.com)\/)/i.test(href)) {
      return ['whatsapp', 'whatsapp:' + number.replace(/%..|\D/g, '')];
    }
  };

  const start = () => {
    let route, done, cta, hover, hovers = 0, depth = 0, focus = 0, active = 0, last = 0;
    const once = (ea, el, ev) => {
      if (!done[ea + ev]) track('interaction', ea, el, ev);
      done[ea + ev] = 1;
    };
    const view = () => {
      const here = location.href.replace(/\?[^#]*|#(?!!?\/).*/g, '');
      if (here !== route) done = {};
      route = here;
      once('view');
    };
    view();

    on('click auxclick', (e) => {
      const link = e.button !== 2 && find(e, calls);
      if (link) track('conversion', ...calls(link));
    });
    on('submit', ({ target }) => {
      const say = (name) => target.getAttribute(name); // target.id may be a field
      track('conversion', 'form_submit', (say('id') || say('name') || say('action') || '').split('?')[0]);
    });
    on('pointerover', (e) => {
      const to = e.pointerType !== 'touch' && find(e, (n) => n.hasAttribute('data-cta') || calls(n));
      if (to === cta) return;
      cta = to;
      clearTimeout(hover);
      hover = to && setTimeout(safe(() => {
        hovers++;
        once('hover_intent', to.getAttribute('data-cta') || calls(to)[1]);
      }), 500);
    });
    on('scroll', () => {
      const seen = scrollY > 0 && Math.round((scrollY + innerHeight) / document.documentElement.scrollHeight * 100);
      depth = Math.max(depth, Math.min(seen, 100));
      [50, 90].forEach((mark) => seen < mark || once('scroll_depth', undefined, mark));
    });
    on('pointerdown pointermove keydown scroll', () => { last = now(); });

    setInterval(safe(() => {
      if (document.hidden) return;
      view(); // an app's next route?
      if (now() - last < 5e3 && active++ % 5 === 0) session(1);
      if (++focus % 30 === 0 && alive(session())) track('system', 'heartbeat');
    }), 1e3);
    on('visibilitychange', () => {
      if (document.hidden) return leave();
      session(1);
      later(0);
    });
    on('pagehide', () => {
      const s = session();
      // once, if the page comes back untouched
      if (!ended) track('system', 'session_end', undefined, undefined, {
        duration_sec: Math.round(((alive(s) ? now() : s.t) - s.start) / 1e3), scroll_pct: depth,
        cta_hovers: hovers, focus_dur: focus, active_sec: active, exit_page: location.href,
      });
      ended = 1;
      leave();
      timer = clearTimeout(timer); // or it takes the turn with it
    });
    on('online', flush);
  };

  window.opsmantik = { track: safe(track), session: safe(session), flush: safe(flush) };
  if (document.prerendering) on('prerenderingchange', start);
  else start();
}))((f) => { try { return f(); } catch (e) {} });
