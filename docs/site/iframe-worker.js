// The theme searches in a worker, and browsers start none from the disk. There it gets a hidden frame that looks like one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(source) {
      super();
      const address = new URL(source, location);
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      const load = url =>
        new Promise((done, failed) => {
          const script = frame.contentDocument.createElement("script");
          script.src = url;
          script.onload = done;
          script.onerror = () => failed(new Error(`${url} did not load`));
          frame.contentDocument.body.append(script);
        });
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = async (...sources) => {
        for (const each of sources) await load(new URL(each, address));
      };
      this.ready = load(address).then(() => inside);
    }
    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }
  };
}
