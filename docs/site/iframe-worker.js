// Browsers start no Worker for a page that was opened from disk. There, the search runs in a hidden
// frame instead, which answers to what the site uses of a Worker: messages both ways.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      window.addEventListener("message", (event) => {
        if (event.source === this.inside) {
          this.dispatchEvent(new MessageEvent("message", { data: event.data }))
        }
      })
      this.ready = new Promise((resolve) => {
        const page = this.inside.document
        page.open()
        page.write("<!doctype html><body></body>")
        page.close()
        this.inside.postMessage = (data) => {
          window.dispatchEvent(new MessageEvent("message", { data, source: this.inside }))
        }
        this.inside.importScripts = (...urls) => Promise.all(urls.map((one) => this.load(one)))
        this.load(url).then(resolve)
      })
    }

    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.inside.document.createElement("script")
        script.src = url
        script.onload = resolve
        script.onerror = reject
        this.inside.document.body.append(script)
      })
    }

    postMessage(data) {
      this.ready.then(() => {
        this.inside.dispatchEvent(new MessageEvent("message", { data }))
      })
    }

    terminate() {}
  }
}
