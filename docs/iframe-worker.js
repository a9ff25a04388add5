// Search in pages that are opened from disk, for which a browser starts no worker: a hidden frame
// runs the worker's script, and passes messages on.
"use strict";

if (location.protocol === "file:") {
  const load = (frame, url) =>
    new Promise((done, failed) => {
      const script = frame.contentDocument.createElement("script");
      script.src = url;
      script.onload = done;
      script.onerror = failed;
      frame.contentDocument.body.append(script);
    });

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      // what the script calls as a worker
      const scope = this.frame.contentWindow;
      scope.postMessage = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        this.onmessage?.(event);
      };
      scope.importScripts = async (...urls) => {
        for (const each of urls) await load(this.frame, each);
      };
      this.ready = load(this.frame, url);
    }

    postMessage(data) {
      const pass = () => {
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
      };
      this.ready.then(pass);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
